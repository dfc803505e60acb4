"""The rooms of the house do not know each other, and saying no costs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("model", "parallel", "data", "training")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_no_sibling_no_config_folder_and_no_hydra(room: str) -> None:
    forbidden = {*ROOMS, "assembly", "conf", "hydra", "tests", "benchmarks"} - {room}
    for path in sorted((ROOT / room).glob("**/*.py")):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & forbidden, f"{path.relative_to(ROOT)} imports {roots & forbidden}"


def test_the_model_knows_nothing_of_distributed_training() -> None:
    for path in sorted((ROOT / "model").glob("*.py")):
        assert not any(name.startswith("torch.distributed") for name in imported(path)), path


def test_the_configuration_is_checked_without_torch() -> None:
    code = "import conf.command, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    for path in [*(ROOT / "conf").glob("*.py"), *(ROOT / room / "config.py" for room in ROOMS)]:
        assert not any(name.split(".")[0] == "torch" for name in imported(path)), path
