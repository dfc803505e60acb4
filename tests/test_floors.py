"""Imports go down only: a room imports the rooms below it, never one above or beside it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom. A longer name decides before a shorter one: conf.cli is not on the floor of conf.
FLOORS = (
    ("corpus.config", "data.config", "dry_run.config", "launch.config", "model.config", "parallel.config",
     "tracking.config", "training.config"),
    ("conf",),
    ("tracking",),
    ("launch",),
    ("data",),
    ("model", "corpus"),
    ("parallel",),
    ("training",),
    ("dry_run",),
    ("conf.cli",),
    ("hydra_plugins", "train", "prepare_data", "export", "generate", "evaluate"),
)  # fmt: skip
ROOMS = {name: floor for floor, names in enumerate(FLOORS) for name in names}
TORCH_FREE = ("conf", "launch", "tracking", "*.config")


def room_of(module: str) -> str | None:
    """Return the longest name in `ROOMS` that a module is or lies in."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in ROOMS), None)


def imports(path: Path) -> list[tuple[int, str]]:
    """Return the line and the module of every import in a file, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            for name in node.names:  # `from parallel import pipeline` imports a module
                whole = f"{module}.{name.name}"
                found.append((node.lineno, whole if (ROOT / f"{whole.replace('.', '/')}.py").exists() else module))
    return found


def offences(path: Path, module: str) -> list[str]:
    """Return the imports of a module that do not go down, as `file:line imports module`."""
    room = room_of(module)
    assert room is not None, f"{path} is in no room"
    wrong = []
    for line, target in imports(path):
        other = room_of(target)
        same_file_floor = ROOMS[room] == 0 and other is not None and ROOMS[other] == 0
        if other is None or other == room or same_file_floor or ROOMS[other] < ROOMS[room]:
            continue
        wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    return wrong


def product_files() -> list[Path]:
    rooms = {name.split(".")[0] for name in ROOMS}
    return [
        path
        for path in sorted(ROOT.rglob("*.py"))
        if path.relative_to(ROOT).parts[0].removesuffix(".py") in rooms and path.name != "__init__.py"
    ]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_imports_go_down() -> None:
    wrong = [offence for path in product_files() for offence in offences(path, module_of(path))]
    assert not wrong, "\n".join(wrong)


def test_an_import_that_goes_up_or_aside_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "model" / "layers.py"
    path.parent.mkdir()
    path.write_text("import data.batches\nimport corpus.encode\n\ndef f():\n    from parallel.mesh import Mesh\n")
    assert offences(path, "model.layers") == [
        "model/layers.py:2 imports corpus.encode",
        "model/layers.py:5 imports parallel.mesh",
    ]


def test_model_does_not_import_torch_distributed() -> None:
    for path in (ROOT / "model").rglob("*.py"):
        assert not any(module.startswith("torch.distributed") for _, module in imports(path)), path


def test_torch_free_rooms_do_not_import_torch() -> None:
    modules = [m for m in map(module_of, product_files()) if m.split(".")[0] in TORCH_FREE or m.endswith(".config")]
    code = f"import importlib, sys; [importlib.import_module(m) for m in {modules}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
