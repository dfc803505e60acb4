"""A checkpoint is whole or not there, and a damaged one is named."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import ROOT
from training.checkpoint import Checkpoints, open_checkpoint
from training.config import CheckpointError, DamagedError, SaveError


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
    checkpoints = Checkpoints(tmp_path, keep=3)
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


def test_the_newest_k_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(5):
        checkpoints.save(step, tensors(), {})
    assert sorted(path.name for path in checkpoints.folder.glob("step-*")) == ["step-00000003", "step-00000004"]


def test_the_best_and_every_nth_are_kept_too(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1, keep_every=40, keep_best=True)
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


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    run: Checkpoints, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Cases 16, 17 and 18: bits that flipped, files cut short, empty, or missing."""
    DAMAGES[damage](run.folder / "step-00000030" / file)
    assert open_checkpoint(run.folder.parent).step == 20
    assert (run.folder / "step-00000030").exists(), "a reader changes nothing"
    newest = run.newest()
    assert newest is not None and newest.step == 20
    told_apart = damage == "remove" or (damage, file) == ("flip", "manifest.json")  # here in the name of a file
    aside = "step-00000030.incomplete" if told_apart else "step-00000030.corrupt"
    assert f"set aside as {aside}" in caplog.text and (run.folder / aside).is_dir()


PASSING = {"ESTALE": 116, "EIO": 5, "EMFILE": 24, "ETIMEDOUT": 110, "late": 2}


@pytest.mark.parametrize("number", PASSING.values(), ids=PASSING)
@pytest.mark.parametrize("at", ["read", "write"])
def test_an_error_that_passes_costs_no_checkpoint(
    run: Checkpoints, monkeypatch: pytest.MonkeyPatch, number: int, at: str
) -> None:
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


@pytest.mark.parametrize("number", [13, 5], ids=["EACCES", "EIO"])
def test_an_error_that_stays_is_no_damage(run: Checkpoints, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def never(path: Path, *args: Any, **kwargs: Any) -> Any:
        raise OSError(number, "for ever", str(path))

    monkeypatch.setattr(Path, "open", never)
    with pytest.raises(CheckpointError, match="for ever") as raised:
        run.newest()
    assert not isinstance(raised.value, DamagedError)
    assert sorted(path.name for path in run.folder.glob("step-*"))[-1] == "step-00000030", "none was set aside"


def test_a_newer_format_names_the_version_that_reads_it(run: Checkpoints) -> None:
    """Case 25: a checkpoint of newer code is no damaged one, and none older is used in its place."""
    manifest = run.folder / "step-00000030" / "manifest.json"
    newer = {**json.loads(manifest.read_text()), "format_version": 2, "readable_since": "0.7.0"}
    manifest.write_text(json.dumps(newer))
    for read in (run.newest, lambda: open_checkpoint(run.folder.parent)):
        with pytest.raises(CheckpointError, match="format_version 2, this code reads 1; use version 0.7.0") as raised:
            read()
        assert not isinstance(raised.value, DamagedError)


def test_a_run_with_only_damaged_checkpoints_is_not_started_over(run: Checkpoints) -> None:
    """Case 19."""
    for path in run.folder.glob("step-*"):
        flip(path / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="step-00000030/__0_0.distcp is damaged"):
        open_checkpoint(run.folder.parent)
    for _ in range(2):  # a requeued job asks again
        with pytest.raises(CheckpointError, match="every checkpoint in .* is damaged"):
            run.newest()


def test_other_names_shapes_or_dtypes_are_refused(run: Checkpoints) -> None:
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


class Mkdir:
    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["PAYLOAD"],)


class Attribute:
    def __reduce__(self) -> tuple:
        return getattr, (Path(os.environ["PAYLOAD"]), "mkdir")


def borrowed() -> bytes:
    """A pickle that reaches os through a module of DCP's that imports it."""

    def text(value: str) -> bytes:
        raw = value.encode()
        return b"\x8c" + bytes([len(raw)]) + raw

    module, function, argument = "torch.distributed.checkpoint.metadata", "os.mkdir", os.environ["PAYLOAD"]
    return b"\x80\x04" + text(module) + text(function) + b"\x93" + text(argument) + b"\x85R."


FORGED = {
    "a call": (lambda: pickle.dumps(Mkdir()), r"asks for posix.mkdir"),
    "a method": (lambda: pickle.dumps(Attribute()), r"is damaged"),
    "a module's import": (borrowed, r"asks for torch.distributed.checkpoint.metadata.os.mkdir"),
}


@pytest.mark.parametrize("forgery", list(FORGED))
def test_metadata_runs_no_code(run: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgery: str) -> None:
    """Case 26."""
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "ran"))
    forged, message = FORGED[forgery]
    step = run.folder / "step-00000030"
    (step / ".metadata").write_bytes(forged())
    manifest = json.loads((step / "manifest.json").read_text())
    del manifest["files"][".metadata"]  # as someone would who forges a checkpoint
    (step / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(step)
    assert not (tmp_path / "ran").exists()


KILLED = """
import os, sys
from pathlib import Path
import torch
import training.checkpoint as module
from training.checkpoint import Checkpoints

phase, folder = sys.argv[1], Path(sys.argv[2])
def die(*_a, **_k): os._exit(9)
if phase == "write": module.save = die
if phase == "manifest": module._describe = die
if phase == "fsync": module._fsync = die
if phase == "rename": module.os.rename = die
if phase == "purge": module.shutil.rmtree = lambda path, **k: die() if ".trash" in str(path) else None
Checkpoints(folder, keep=1).save(40, {"model.a": torch.ones(3)}, {})
"""


@pytest.mark.parametrize("phase", ["write", "manifest", "fsync", "rename", "purge"])
def test_a_kill_at_any_moment_leaves_a_good_checkpoint(run: Checkpoints, phase: str) -> None:
    """Cases 2 and 11."""
    shutil.rmtree(run.folder / "step-00000010")
    shutil.rmtree(run.folder / "step-00000020")
    done = subprocess.run([sys.executable, "-c", KILLED, phase, str(run.folder.parent)], cwd=ROOT)
    assert done.returncode == 9
    again = Checkpoints(run.folder.parent, keep=1)
    newest = again.newest()
    assert newest is not None and newest.step == (40 if phase == "purge" else 30)
    assert [path.name for path in run.folder.glob(".*")] == [".begun"], "leftovers are swept"


def test_a_full_disk_costs_nothing(run: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.checkpoint._fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device \(about 78 bytes"):
        run.save(40, tensors(), {})
    assert sorted(p.name for p in run.folder.glob("step-*")) == [f"step-000000{n}" for n in (10, 20, 30)]
    monkeypatch.undo()
    assert run.save(40, tensors(), {}).name == "step-00000040"


def test_a_disk_that_is_full_and_then_is_not(small_disk: Path) -> None:
    """Cases 3 and 7, on a real disk."""
    run, big = Checkpoints(small_disk, keep=1), {"model.a": torch.zeros(75_000)}
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


def test_a_folder_that_cannot_be_written_to_is_refused_at_the_start(small_disk: Path) -> None:
    """Case 8."""
    Checkpoints(small_disk, keep=1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        Checkpoints(small_disk, keep=1)


def test_what_cannot_be_removed_is_a_warning(
    run: Checkpoints, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Case 10: at a purge, and of a run that was killed."""
    (run.folder / ".tmp-step-00000040").mkdir()

    def immutable(*_: object, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(1, "immutable")

    monkeypatch.setattr(shutil, "rmtree", immutable)
    monkeypatch.setattr(os, "rename", immutable)
    again = Checkpoints(run.folder.parent, keep=1)
    again._purge()
    assert caplog.text.count("could not be removed") == 3 and len(list(run.folder.glob("step-*"))) == 3


def test_a_folder_that_has_vanished_is_not_begun_anew(tmp_path: Path) -> None:
    """A disk that is not mounted: the folder is not there, or empty, though the run has made steps."""
    Checkpoints(tmp_path, keep=1)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 9}\n')
    Checkpoints(tmp_path, keep=1)  # of a run that was killed before it saved
    shutil.rmtree(tmp_path / "checkpoints")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="it may not be mounted"):
            Checkpoints(tmp_path, keep=1)
        (tmp_path / "checkpoints").mkdir(exist_ok=True)


def test_a_step_is_never_written_over(run: Checkpoints) -> None:
    """Case 13."""
    with pytest.raises(SaveError, match="step-00000030 exists"):
        run.save(30, tensors(99), {})
    assert torch.equal(open_checkpoint(run.folder.parent).read("model.")["b"], tensors(30)["model.b"])


def test_a_file_size_limit_in_the_writer_is_an_error(tmp_path: Path) -> None:
    """Case 4."""
    code = (
        "import resource, signal, torch; from pathlib import Path; from training.checkpoint import Checkpoints\n"
        f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN); c = Checkpoints(Path('{tmp_path}'), keep=1)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); c.save(1, {'model.a': torch.zeros(1 << 20)}, {})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "was not saved to" in done.stderr
    assert not list((tmp_path / "checkpoints").glob("*step*"))


def test_an_interrupt_while_saving_is_no_failed_checkpoint(run: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert Checkpoints(tmp_path, keep=1).newest() is None
