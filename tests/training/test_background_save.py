"""A checkpoint that is written while training goes on holds the step it was taken at, and its failure is reported."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import training.checkpoint
from parallel.engine import count_step
from tests.conftest import metrics, trained
from tracking.metrics_file import read_records
from training.checkpoint import open_checkpoint
from training.config import SaveError
from training.loop import Periodic, Run
from training.stop import StopRequest

BEHIND = ["checkpoint.asynchronous=true", "checkpoint.every=3", "checkpoint.keep=0", "steps=8"]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The first write waits for this event; every one takes a while."""
    event, write = threading.Event(), training.checkpoint._write

    def wait_and_write(*args: Any) -> int:
        assert event.wait(60)
        time.sleep(0.3)
        return write(*args)

    monkeypatch.setattr(training.checkpoint, "_write", wait_and_write)
    return event


def at(step: int, action: Callable[[Run], object]) -> Periodic:
    return Periodic(1, lambda run: action(run) if run.state.step == step else None)


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def test_background_save_equals_a_blocking_one(tmp_path: Path, small: list[str], held: threading.Event) -> None:
    settings = [*small, *BEHIND, "precision=bf16"]
    buffers: list[int] = []

    def release(run: Run) -> None:
        assert run.checkpoints.saving is not None and not steps_of(tmp_path / "behind"), "not one step waited"
        held.set()

    def note(run: Run) -> None:
        run.checkpoints.note_saved(wait=True)
        buffers.append(run.checkpoints.snapshot.take().weights.shards["head.weight"].data_ptr())

    trained(tmp_path / "behind", *settings, periodic=[at(5, release), at(7, note), at(8, note)])
    trained(tmp_path / "waits", *settings, "checkpoint.asynchronous=false")
    assert steps_of(tmp_path / "behind") == steps_of(tmp_path / "waits") == [3, 6, 8]
    for step in (3, 6, 8):
        one, other = (open_checkpoint(tmp_path / name, step=step) for name in ("behind", "waits"))
        assert one.state["progress"] == other.state["progress"]
        a, b = one.read(""), other.read("")
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert len(set(buffers)) == 1, "the host's memory is allocated once"
    times = {key for r in read_records(tmp_path / "behind" / "metrics.jsonl") for key in r if "checkpoint" in key}
    assert times == {"perf/checkpoint_stall_s", "perf/checkpoint_s", "perf/checkpoint_bytes_per_s"}


def test_saves_queue(tmp_path: Path, small: list[str], held: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    """Case 9: a save slower than the interval."""
    release = at(6, lambda _: threading.Timer(0.5, held.set).start())
    trained(tmp_path / "r", *small, *BEHIND, periodic=[release])
    assert steps_of(tmp_path / "r") == [3, 6, 8]
    assert caplog.text.count("step 6 waits for the previous save") == 1


@pytest.mark.parametrize("stop_at", [3, 4])
def test_stop_waits_for_the_save(tmp_path: Path, small: list[str], held: threading.Event, stop_at: int) -> None:
    """Cases 32 and 35: SIGTERM while a save is under way, of this step or of one before."""
    stop = StopRequest()

    def ask(_: Run) -> None:
        stop.signum = signal.SIGTERM
        threading.Timer(0.5, held.set).start()

    trained(tmp_path / "r", *small, *BEHIND, stop=stop, periodic=[at(stop_at, ask)])
    assert steps_of(tmp_path / "r") == sorted({3, stop_at})
    assert open_checkpoint(tmp_path / "r").step == stop_at


def test_a_stop_says_which_step_was_saved(tmp_path: Path, small: list[str]) -> None:
    """Case 42: nothing is saved of steps without a finite gradient, the last one included."""
    stop = StopRequest()

    def spoil(run: Run) -> None:
        for _ in range(2):
            count_step(run.state.counts_3, torch.tensor(False))
        stop.signum = signal.SIGTERM

    trained(tmp_path / "r", *small, "checkpoint.every=3", stop=stop, periodic=[at(5, spoil)])
    assert stop.summary()["reason"] == "SIGTERM on rank 0, saved at step 3"
    assert steps_of(tmp_path / "r") == [3]


@pytest.mark.parametrize("policy", ["warn", "stop"])
def test_failed_background_save_is_reported_once(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, policy: str
) -> None:
    """Case 5: a full disk in the background."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def mend(run: Run) -> None:
        saving = run.checkpoints.saving
        assert saving is not None and isinstance(saving.exception(60), SaveError)
        monkeypatch.undo()

    monkeypatch.setattr(training.checkpoint, "_fsync", full)
    run = [*small, *BEHIND, f"checkpoint.on_save_error={policy}"]
    if policy == "stop":
        with pytest.raises(SaveError, match="step 3 was not saved to .*No space left"):
            trained(tmp_path / "r", *run, periodic=[at(4, mend)])
        assert metrics(tmp_path / "r")[-1]["step"] == 4 and not steps_of(tmp_path / "r")
        return
    trained(tmp_path / "r", *run, periodic=[at(4, mend)])
    assert caplog.text.count("step 3 was not saved") == 1
    assert steps_of(tmp_path / "r") == [6, 8], "saved at the next interval"


def test_error_in_a_step_waits_for_the_save(tmp_path: Path, small: list[str], held: threading.Event) -> None:
    def fail(_: Run) -> None:
        threading.Timer(0.5, held.set).start()
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        trained(tmp_path / "r", *small, *BEHIND, periodic=[at(4, fail)])
    assert steps_of(tmp_path / "r") == [3]
