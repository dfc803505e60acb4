"""A run folder belongs to one process and one configuration."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tracking import run_folder
from training.config import CheckpointConfig, CheckpointError

SHAPE = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64}
STORED: dict[str, Any] = {
    "seed": 0,
    "model": {**SHAPE, "attention_bias": False, "tie_embeddings": False, "rope_theta": 1e4, "norm_eps": 1e-5},
    "init_from": None,
}


def test_a_held_folder_names_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 12."""
    owner = f"process {os.getpid()} on"
    for _ in range(2):
        assert not run_folder.is_held(tmp_path)
        with run_folder.locked(tmp_path):
            assert run_folder.is_held(tmp_path)
            with pytest.raises(CheckpointError, match=owner), run_folder.locked(tmp_path):
                pass
            with pytest.raises(CheckpointError, match=owner):
                run_folder.check_not_held(tmp_path)
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
    with pytest.raises(CheckpointError, match="a disk without file locks"), run_folder.locked(tmp_path):
        pass


def test_changed_keys_must_be_free_or_accepted() -> None:
    old = {"steps": 10, "optimizer": {"lr": 0.1}, "logger": {"every": 1}, "model": {}}
    new = {"steps": 20, "optimizer": {"lr": 0.2}, "logger": {"every": 5}, "model": {"parametrization": "standard"}}
    changes = [("logger.every", 1, 5), ("optimizer.lr", 0.1, 0.2), ("steps", 10, 20)]
    assert list(run_folder.changed_keys(old, new)) == changes
    for accepted, left in (([], "optimizer.lr,steps"), (["optimizer"], "steps"), (["steps"], "optimizer.lr")):
        with pytest.raises(CheckpointError, match=rf"checkpoint.accept_changes=\[{left}\]"):
            run_folder.check_changes(old, new, accepted, Path("runs/x"))
    run_folder.check_changes(old, new, ["optimizer.lr", "steps"], Path("runs/x"))
    new["model"]["parametrization"] = "mup"  # a setting that the older run did not have has its default there
    assert ("model.parametrization", "standard", "mup") in run_folder.changed_keys(old, new)
    old["data"] = {"no_more": 1, "mix": {"code": 1.0}}
    new["data"] = {"mix": {}}  # a setting that is no more is no change, and a source that is no more is one
    assert {key for key, *_ in run_folder.changed_keys(old, new) if key.startswith("data")} == {"data.mix.code"}


def stored_run(folder: Path, text: str) -> Path:
    state = folder / "checkpoints" / "step-00000003" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(text)
    return folder


def test_stored_configurations_are_checked_before_any_device(tmp_path: Path) -> None:
    """Case 22."""
    run = stored_run(tmp_path / "old", json.dumps({"config": STORED}))
    wider = {**STORED, "model": {**STORED["model"], "d_model": 64, "n_layers": 3}, "init_from": str(run)}
    run_folder.check_stored_config(run, STORED, CheckpointConfig())
    run_folder.check_stored_config(tmp_path / "new", {**wider, "model": STORED["model"]}, CheckpointConfig())
    for folder, message in (
        (run, r"old was started.* model.d_model \(32, now 64\), model.n_layers \(2, now"),
        (tmp_path / "new", "step-00000003 is of another model; pass model.d_model=32 model.n_layers=2"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run_folder.check_stored_config(folder, wider, CheckpointConfig())
    cut = stored_run(tmp_path / "cut", "{")
    run_folder.check_stored_config(cut, wider, CheckpointConfig())  # left to the verification


def test_checkpoints_are_found_by_run_and_by_name(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run", "{}")
    for name in ("step-00000012", ".step-00000020.partial"):
        (run / "checkpoints" / name).mkdir()
    assert [path.name for path in run_folder.checkpoints_in(run)] == ["step-00000012", "step-00000003"]
    last = run / "checkpoints" / "step-00000012"
    assert run_folder.checkpoints_in(last) == [last]
    run_folder.check_origin(run)
    for check in (run_folder.checkpoints_in, run_folder.check_origin):
        for missing in (tmp_path, tmp_path / "none", run / "checkpoints" / "step-00000099"):
            with pytest.raises(CheckpointError):
                check(missing)
    (tmp_path / "config.json").touch()
    run_folder.check_origin(tmp_path)


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("3", {2: (False, False), 3: (True, True), 4: (False, True)}),
        ("-3", {2: (False, False), 3: (True, False), 4: (False, False)}),
        ("soon", {1: (False, False)}),
        (None, {3: (False, False)}),
    ],
)
def test_a_stop_file_names_a_step(tmp_path: Path, text: str | None, answers: dict) -> None:
    if text is not None:
        (tmp_path / "stop").write_text(f"{text}\n")
    assert {step: run_folder.StopFile(str(tmp_path / "stop")).read(step) for step in answers} == answers
    assert run_folder.StopFile(None).read(3) == (False, False)
