"""A checkpoint is whole or not there, and a damaged one is named."""

import errno
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import run_ranks
from training.checkpoint import Checkpoints, open_checkpoint
from training.config import CheckpointConfig, CheckpointError, DamagedError, SaveError


def tensors(fill: float = 0.0) -> dict[str, Tensor]:
    return {
        "model.a": torch.arange(12, dtype=torch.float32).view(3, 4) + fill,
        "model.b": torch.full((5,), fill, dtype=torch.bfloat16),
        "optimizer.a.step": torch.tensor(7.0 + fill),
        "rng.cpu": torch.arange(16, dtype=torch.uint8),
    }


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracking.retry.WAITS_S", (0.01, 0.01))


@pytest.fixture
def run(tmp_path: Path) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=3))
    for step in (10, 20, 30):
        checkpoints.save(step, tensors(step), {"progress": {"step": step}, "config": {"lr": 0.1}})
    return checkpoints


def test_round_trip_is_exact(run: Checkpoints) -> None:
    """Case 28."""
    os.utime(run.folder / "step-00000010", (4e9, 4e9))  # the newest is the highest step
    newest = run.newest()
    assert newest is not None and (newest.step, newest.state["progress"]) == (30, {"step": 30})
    target = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    newest.load(target, exact=True)
    for name, tensor in tensors(30).items():
        assert torch.equal(target[name], tensor) and target[name].dtype == tensor.dtype
    assert list(newest.read("model.")) == ["a", "b"]


def test_the_best_and_every_nth_are_kept_too(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1, keep_every=40, keep_best=True))
    losses = {10: 3.0, 20: 2.0, 30: None, 40: 4.0, 50: 2.5, 60: 1.0, 70: 5.0}
    for step, loss in losses.items():  # the run was stopped at 60 before its validation
        progress = {"valid_loss": loss, "validated_step": 50 if step == 60 else step}
        checkpoints.save(step, tensors(), {"progress": progress})
    assert [int(path.name[5:]) for path in sorted(checkpoints.folder.glob("step-*"))] == [20, 40, 70]
    checkpoints.save(80, tensors(), {"progress": {"valid_loss": 1.5, "validated_step": 80}})
    assert [int(path.name[5:]) for path in sorted(checkpoints.folder.glob("step-*"))] == [40, 80]


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


FILES = ("__0_0.distcp", ".metadata", "state.json", "manifest.json")
DAMAGES = {
    "flip": flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "remove": lambda path: path.unlink(),
}


@pytest.mark.parametrize(("file", "damage"), [*zip(FILES, DAMAGES, strict=True), (FILES[0], "cut"), (FILES[3], "cut")])
def test_damaged_one_is_set_aside(run: Checkpoints, file: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """Cases 16, 17 and 18: bits that flipped, files cut short, empty, or missing."""
    DAMAGES[damage](run.folder / "step-00000030" / file)
    assert open_checkpoint(run.folder.parent).step == 20
    assert (run.folder / "step-00000030").exists(), "a reader changes nothing"
    newest = run.newest()
    assert newest is not None and newest.step == 20
    told_apart = damage == "remove" or (damage, file) == ("flip", "manifest.json")  # here in the name of a file
    aside = "step-00000030.incomplete" if told_apart else "step-00000030.corrupt"
    assert f"set aside as {aside}" in caplog.text and (run.folder / aside).is_dir()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOENT])
@pytest.mark.parametrize("at", ["read", "write"])
def test_transient_error_is_retried(run: Checkpoints, monkeypatch: pytest.MonkeyPatch, number: int, at: str) -> None:
    """Case 14: a file not seen yet, and what a network disk raises now and then."""
    real, failures = Path.open, [number, number]

    def sometimes(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == "__0_0.distcp" and failures:
            raise OSError(failures.pop(), "for now", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", sometimes)
    if at == "write":
        run.save(40, tensors(40), {})
    newest = run.newest()
    assert newest is not None and newest.step == (40 if at == "write" else 30) and not failures


def test_lasting_error_is_no_damage(run: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(path: Path, *args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EIO, "for ever", str(path))

    monkeypatch.setattr(Path, "open", never)
    with pytest.raises(CheckpointError, match="for ever") as raised:
        run.newest()
    assert not isinstance(raised.value, DamagedError)
    assert sorted(path.name for path in run.folder.glob("step-*"))[-1] == "step-00000030", "none was set aside"


def test_other_format_names_its_version(run: Checkpoints) -> None:
    """Case 25: a checkpoint of newer code is no damaged one, and none older is used in its place."""
    manifest = run.folder / "step-00000030" / "manifest.json"
    newer = {**json.loads(manifest.read_text()), "format_version": 2, "readable_since": "0.7.0"}
    manifest.write_text(json.dumps(newer))
    for read in (run.newest, lambda: open_checkpoint(run.folder.parent)):
        with pytest.raises(CheckpointError, match="format_version 2, this code reads 1; use version 0.7.0") as raised:
            read()
        assert not isinstance(raised.value, DamagedError)


def test_only_damaged_checkpoints_is_an_error(run: Checkpoints) -> None:
    """Case 19."""
    for path in run.folder.glob("step-*"):
        flip(path / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="step-00000030/__0_0.distcp is damaged"):
        open_checkpoint(run.folder.parent)
    for _ in range(2):  # a requeued job asks again
        with pytest.raises(CheckpointError, match="every checkpoint in .* is damaged"):
            run.newest()


def test_other_names_shapes_dtypes_are_refused(run: Checkpoints) -> None:
    """Cases 22 and 23."""
    newest = run.newest()
    assert newest is not None
    changed = tensors()
    changed["model.c"] = changed.pop("model.b")
    with pytest.raises(CheckpointError, match=r"missing model.c, unused model.b"):
        newest.load(changed, exact=True)
    with pytest.raises(CheckpointError, match=r"model.a \(\(3, 4\) torch.float32, now \(4, 3\)"):
        newest.load({**tensors(), "model.a": torch.zeros(4, 3)}, exact=True)
    with pytest.raises(CheckpointError, match=r"torch.bfloat16, now \(5,\) torch.float32"):
        newest.load({**tensors(), "model.b": torch.zeros(5)}, exact=True)
    with pytest.raises(CheckpointError, match=r"missing optimizer.a.momentum"):
        newest.load({"optimizer.a.momentum": torch.zeros(3, 4)})


FORGED = {  # pickles
    "a call": ("cposix\nmkdir\n(V{}\ntR.", r"imports posix.mkdir"),
    "a method": ("cbuiltins\ngetattr\n(cpathlib\nPath\n(V{}\ntRVmkdir\ntR(tR.", r"is damaged"),
    "a module's import": ("ctorch.distributed.checkpoint.metadata\nos.mkdir\n(V{}\ntR.", r"metadata.os.mkdir"),
}


@pytest.mark.parametrize("forgery", list(FORGED))
def test_metadata_runs_no_code(run: Checkpoints, tmp_path: Path, forgery: str) -> None:
    """Case 26."""
    forged, message = FORGED[forgery]
    step = run.folder / "step-00000030"
    (step / ".metadata").write_text(forged.format(tmp_path / "ran"))
    manifest = json.loads((step / "manifest.json").read_text())
    del manifest["files"][".metadata"]  # as someone would who forges a checkpoint
    (step / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(step)
    assert not (tmp_path / "ran").exists()


DIES_AT = {"write": "save", "manifest": "_describe", "fsync": "_fsync", "rename": "os.rename", "purge": "shutil.rmtree"}


def killed(_rank: int, folder: Path, phase: str) -> None:
    def die(path: object = None, *_: object, **__: object) -> None:
        if phase != "purge" or ".trash" in str(path):
            os._exit(9)

    pytest.MonkeyPatch().setattr(f"training.checkpoint.{DIES_AT[phase]}", die)
    Checkpoints(folder, CheckpointConfig(keep=1)).save(40, {"model.a": torch.ones(3)}, {})


@pytest.mark.parametrize("phase", DIES_AT)
def test_kill_leaves_a_good_checkpoint(run: Checkpoints, phase: str) -> None:
    """Cases 2 and 11."""
    shutil.rmtree(run.folder / "step-00000010")
    shutil.rmtree(run.folder / "step-00000020")
    assert run_ranks(killed, 1, run.folder.parent, phase) == [9]
    again = Checkpoints(run.folder.parent, CheckpointConfig(keep=1))
    newest = again.newest()
    assert newest is not None and newest.step == (40 if phase == "purge" else 30)
    assert [path.name for path in run.folder.glob(".*")] == [".begun"], "leftovers are swept"


def test_full_disk_is_survived(small_disk: Path) -> None:
    """Cases 3 and 7, on a real disk."""
    run, big = Checkpoints(small_disk, CheckpointConfig(keep=1)), {"model.a": torch.zeros(75_000)}
    run.save(10, big, {})
    with pytest.raises(SaveError) as raised:
        run.save(20, big, {})
    message = str(raised.value)
    assert "[Errno 28] No space left on device" in message and "about 300,000 bytes are needed" in message
    free = int(re.findall(r"([\d,]+) are free", message)[0].replace(",", ""))
    assert free < 4096, "as it was when the write failed"
    assert [path.name for path in run.folder.glob("*step*")] == ["step-00000010"]
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    run.save(30, big, {})
    assert open_checkpoint(small_disk).step == 30


def test_read_only_folder_is_refused(small_disk: Path) -> None:
    """Case 8."""
    Checkpoints(small_disk, CheckpointConfig(keep=1))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        Checkpoints(small_disk, CheckpointConfig(keep=1))


def test_vanished_folder_is_not_begun_anew(tmp_path: Path) -> None:
    """A disk that is not mounted: the folder is not there, or empty, though the run has made steps."""
    Checkpoints(tmp_path, CheckpointConfig(keep=1))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 9}\n')
    Checkpoints(tmp_path, CheckpointConfig(keep=1))  # of a run that was killed before it saved
    shutil.rmtree(tmp_path / "checkpoints")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="it may not be mounted"):
            Checkpoints(tmp_path, CheckpointConfig(keep=1))
        (tmp_path / "checkpoints").mkdir(exist_ok=True)


def test_step_is_never_overwritten(run: Checkpoints) -> None:
    """Case 13."""
    with pytest.raises(SaveError, match="step-00000030 exists"):
        run.save(30, tensors(99), {})
    assert torch.equal(open_checkpoint(run.folder.parent).read("model.")["b"], tensors(30)["model.b"])


def test_interrupt_while_saving(run: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_data(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.checkpoint.FileSystemWriter.write_data", write_data)
    with pytest.raises(KeyboardInterrupt):
        run.save(40, tensors(), {})


def test_state_must_be_finite(run: Checkpoints) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        run.save(40, tensors(), {"loss": float("nan")})
    assert not (run.folder / "step-00000040").exists()


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        open_checkpoint(tmp_path)
    assert Checkpoints(tmp_path, CheckpointConfig(keep=1)).newest() is None
