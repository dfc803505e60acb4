"""Files are UTF-8 and output never raises, whatever the locale."""

import ast
import sys
from io import BytesIO, TextIOWrapper

import pytest

from tests.test_floors import ROOT, product_files
from tracking.logs import escape_unprintable

TEXT_METHODS = {"read_text": 0, "write_text": 1}  # and which argument is the encoding


def opens_by_locale(call: ast.Call) -> bool:
    """Return whether a call reads or writes text without naming an encoding."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    keys = {keyword.arg for keyword in call.keywords}
    if name in TEXT_METHODS:
        return "encoding" not in keys and len(call.args) <= TEXT_METHODS[name]
    if name in ("FileHandler", "NamedTemporaryFile", "fdopen"):
        return "encoding" not in keys and "mode" not in keys
    module = getattr(call.func.value, "id", "") if isinstance(call.func, ast.Attribute) else ""
    if name != "open" or module in ("os", "fsspec", "tarfile"):
        return False
    modes = [ast.unparse(arg) for arg in (*call.args, *(keyword.value for keyword in call.keywords))]
    return "encoding" not in keys and not any("b" in mode.strip("'\"") and len(mode) <= 5 for mode in modes)


def test_text_files_are_utf8() -> None:
    wrong = []
    for path in {*product_files(), *(ROOT / "benchmarks").glob("*.py")} - {
        ROOT / "corpus/compression.py"
    }:  # opens URLs
        calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
        wrong += [f"{path.relative_to(ROOT)}:{call.lineno}" for call in calls if opens_by_locale(call)]
    assert wrong == []


@pytest.mark.parametrize("encoding", ["gb18030", "latin-1", "ascii"])
def test_output_escapes_what_a_terminal_cannot_show(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    terminal = TextIOWrapper(BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    escape_unprintable()
    print("今天 naïve \udce4", flush=True)
    written = terminal.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert written.startswith("今天 naïve" if encoding == "gb18030" else "\\u4eca\\u5929 na") and "\\udce4" in written
