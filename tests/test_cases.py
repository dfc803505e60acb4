"""Every case of docs/faults.md is named by a test, and every guard that is broken on purpose is of such a case."""

import ast
import re

from tests.conftest import ROOT
from tests.mutants import MUTANTS


def named() -> dict[int, list[str]]:
    """Return the tests that name each case in their docstrings, such as Cases 2 and 6."""
    found: dict[int, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for test in ast.walk(ast.parse(path.read_text())):
            if isinstance(test, ast.FunctionDef) and (
                text := re.match(r"Cases? ([\d, and]+)", ast.get_docstring(test) or "")
            ):
                for number in re.findall(r"\d+", text[1]):
                    found.setdefault(int(number), []).append(f"{path.relative_to(ROOT)}::{test.name}")
    return found


def test_every_case_is_named_by_a_test() -> None:
    cases = set(map(int, re.findall(r"^\| (\d+) \|", (ROOT / "docs/faults.md").read_text(), re.MULTILINE)))
    assert cases == set(range(1, 50))
    assert not cases - named().keys(), "cases without a test"
    assert not cases - {mutant.case for mutant in MUTANTS}, "cases without a guard in tests/mutants.py"


def test_every_guard_is_there_once() -> None:
    tests = named()
    for mutant in MUTANTS:
        text = (ROOT / mutant.file).read_text()
        assert text.count(mutant.code) == 1, f"tests/mutants.py: {mutant.file} has another text than {mutant.code!r}"
        path, _, name = mutant.test.partition("::")
        assert name.split("[")[0] in (ROOT / path).read_text(), f"{path} has no {name}"
        assert any(test.startswith(f"{path}::") for test in tests[mutant.case]), f"case {mutant.case} is not in {path}"
