"""A full disk costs nothing but the checkpoint that did not fit; on a disk of half a megabyte."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from launch.ranks import RankEnd
from tests.conftest import metrics, trained
from tracking.logs import log_to
from tracking.metrics_file import read_records
from tracking.run_folder import Lines
from tracking.status import Status, read_status
from training.checkpoint import open_checkpoint
from training.config import CheckpointError, SaveError
from training.loop import Periodic, Run

SETTINGS = ["steps=10", "checkpoint.every=2", "checkpoint.keep=1", "model.vocab_size=1024"]


def fill(disk: Path) -> None:
    """Leave not a byte."""
    with suppress(OSError), (disk / "junk").open("wb", buffering=0) as file:
        while file.write(b"x" * 512):
            pass


@pytest.mark.parametrize("disk_size", ["4m"])
def test_a_disk_that_is_full_for_a_while(small_disk: Path, small: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """Case 7: log, metrics and the run itself go on; the next save that fits is made."""
    folder = small_disk / "r"
    folder.mkdir()

    def act(run: Run) -> None:
        if run.state.step == 3:
            run.checkpoints.note_saved(wait=True)  # that of step 2, which fits
            fill(small_disk)
        if run.state.step == 7:
            (small_disk / "junk").unlink()

    with log_to(folder), Status(folder, {"steps": 10}) as status:
        trained(folder, *small, *SETTINGS, "checkpoint.asynchronous=true", periodic=[Periodic(1, act)])
        status.end(None, stopped=False, given_up=False)
    assert [r["step"] for r in metrics(folder) if "train/loss" in r] == list(range(1, 11))
    lines = (folder / "train.log").read_text()
    assert all(f"step {step:2d}/10" in lines for step in range(1, 11)), "none is lost"
    assert open_checkpoint(folder).step == 10 and read_status(folder)["state"] == "finished"
    failed = [record.message for record in caplog.records if "was not saved" in record.message]
    assert 1 <= len(failed) <= 2 and all("[Errno 28]" in text and "are free" in text for text in failed)
    assert all(f"step {step} was saved" not in lines for step in (4, 6))


@pytest.mark.parametrize("disk_size", ["4m"])
def test_a_disk_that_stays_full_ends_the_run_as_a_crash(small_disk: Path, small: list[str]) -> None:
    """Case 3: the last save must not fail in silence; what was saved before stays."""
    folder = small_disk / "r"
    folder.mkdir()
    full = Periodic(1, lambda run: fill(small_disk) if run.state.step == 3 else None)
    with pytest.raises(SaveError, match="step 10 was not saved"), log_to(folder), Status(folder, {"steps": 10}):
        trained(folder, *small, *SETTINGS, periodic=[full])
    status = read_status(folder)
    assert status["state"] == "failed" and "No space left" in status["reason"]
    os.unlink(small_disk / "junk")
    assert open_checkpoint(folder).step == 2
    assert trained(folder, *small, *SETTINGS) is not None and open_checkpoint(folder).step == 10


@pytest.mark.parametrize(
    ("error", "again"),
    [(SaveError("x"), True), (OSError(28, "full"), True), (OSError(13, "x"), False), (CheckpointError("x"), False)],
)
def test_a_full_disk_is_a_crash_that_another_attempt_may_mend(error: Exception, again: bool) -> None:
    assert RankEnd(error=error, text=str(error)).is_crash == again


def test_lines_wait_for_room(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = Lines(small_disk / "train.log")
    fill(small_disk)
    for number in range(1000):
        lines.write(f"line {number}\n")
    assert caplog.text.count("lines are kept in memory and written later") == 1
    (small_disk / "junk").unlink()
    lines.close()
    assert (small_disk / "train.log").read_text() == "".join(f"line {number}\n" for number in range(1000))


def test_a_bad_line_costs_that_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\x00 {"st\n[2]\n{"step": 3}\n{"step": 4, "tok')
    lines = Lines(path)
    lines.write('{"step": 5}\n')
    lines.close()
    assert [record["step"] for record in read_records(path)] == [1, 3, 5]
