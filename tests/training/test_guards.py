"""Each guard of a checkpoint by itself: what one catches, another would hide."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tracking.run_folder import checkpoints_in
from training import checkpoint as module
from training.agreement import check_tensors
from training.checkpoint import Checkpoints
from training.config import CheckpointConfig, CheckpointError, TrainingError
from training.ranks import Ranks

TENSORS = {"model.a": torch.ones(3, 4), "model.b": torch.zeros(5, dtype=torch.bfloat16)}


@pytest.fixture
def run(tmp_path: Path) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=3))
    for step in (10, 20):
        checkpoints.save(step, TENSORS, {})
    return checkpoints


def test_files_are_synced_before_the_rename(run: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases 2 and 6."""
    synced: list[Path] = []
    fsync, rename = module._fsync, os.rename

    def renamed(old: Path, new: Path) -> None:
        if Path(new).name.startswith("step-"):
            assert {path.name for path in Path(old).iterdir()} == {path.name for path in synced if path.parent == old}
            assert old in synced and not Path(new).exists()
            synced.clear()
        rename(old, new)

    monkeypatch.setattr(module, "_fsync", lambda path: (synced.append(path), fsync(path)))
    monkeypatch.setattr(module.os, "rename", renamed)
    run.save(30, TENSORS, {})
    assert synced == [run.folder], "and then the name does"


def test_lost_writes_are_noticed(run: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 4: a writer of several threads can lose an error of one of them."""
    save = module.save

    def lossy(tensors: dict[str, Tensor], **settings: Any) -> object:
        return save({"model.a": tensors["model.a"]}, **settings)

    monkeypatch.setattr(module, "save", lossy)
    with pytest.raises(CheckpointError, match="model.b were not written"):
        run.save(30, TENSORS, {})


def test_unremovable_warns(run: Checkpoints, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Case 10: at a purge, and of a run that was killed."""
    rename, run.config.keep = os.rename, 1
    (run.folder / ".tmp-step-00000040").mkdir()

    def refused(old: Path, new: Path) -> None:
        if ".trash" in str(new):
            raise PermissionError(1, "Operation not permitted")
        rename(old, new)

    monkeypatch.setattr(module.os, "rename", refused)
    assert run.save(30, TENSORS, {}).exists() and caplog.text.count("could not be removed") == 2
    Checkpoints(run.folder.parent, CheckpointConfig(keep=1))
    assert caplog.text.count("could not be removed") == 3


def test_first_rank_lists_checkpoints(run: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 14: the list of another rank may be old."""
    asked: list[list[Path]] = []
    monkeypatch.setattr(module, "_first_good", lambda paths, *_: asked.append(paths) or (None, {}))
    monkeypatch.setattr(run.ranks, "on_first", lambda _: [run.folder / "step-00000010"])
    run.newest()
    assert asked == [[run.folder / "step-00000010"]]


def test_wrong_size_is_not_read(run: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 16."""
    cut = run.folder / "step-00000020" / "__0_0.distcp"
    os.truncate(cut, 10)
    describe, read = module._describe, []
    monkeypatch.setattr(module, "_describe", lambda path: (read.append(path), describe(path))[1])
    newest = run.newest()
    assert newest is not None and newest.step == 10 and cut not in read


def test_missing_step_is_an_error(run: Checkpoints) -> None:
    """Case 27."""
    assert checkpoints_in(run.folder, 10) == [run.folder / "step-00000010"]
    with pytest.raises(CheckpointError, match=r"step \(30\): .* has no checkpoint of that step; choose from 10, 20"):
        checkpoints_in(run.folder, 30)


def test_differing_replicas_are_named() -> None:
    """Case 44."""
    mine, ranks = {"model.a": torch.ones(3, 4), "model.b": torch.ones(5)}, Ranks()
    seen: list[dict] = []  # by each call, as if of one more rank
    ranks.all_gather = lambda step: seen.append(step()) or seen  # type: ignore[method-assign]
    check_tensors(mine, ranks)
    check_tensors(mine, ranks)
    mine["model.b"].view(torch.int32)[3] ^= 1
    with pytest.raises(TrainingError, match=r"the replicas of model.b on ranks 0 and 2 differ"):
        check_tensors(mine, ranks)
