"""A rank that is stopped or late is named by another one of its machine, with where it is."""

import json
import logging
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tracking.heartbeat import Heartbeat, late_file, sign_file
from tracking.run_folder import write_atomically


def watched(folder: Path, monkeypatch: pytest.MonkeyPatch, *signs: dict, seconds: float = 0.6) -> None:
    """Be rank 0 that waits for `seconds`, beside ranks with these signs of life, written over and over."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(len(signs) + 1))
    with Heartbeat(folder, 0, lambda: 1, late_s=0.3, pending=lambda: "all_reduce #7 (started)"):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for rank, sign in enumerate(signs, 1):
                fresh = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}
                write_atomically(sign_file(folder, rank), json.dumps({**fresh, **sign}))
            time.sleep(0.01)


def test_a_stopped_process_is_named_with_its_wait_channel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Case 30."""
    with subprocess.Popen(["sleep", "60"]) as process:
        process.send_signal(signal.SIGSTOP)
        watched(tmp_path, monkeypatch, {"pid": process.pid, "time": 0})
        process.kill()
    (record,) = [record for record in caplog.records if hasattr(record, "alert")]
    found = (
        f"others wait in all_reduce #7 (started): its process {process.pid} on {socket.gethostname()} is T (stopped)"
    )
    assert record.message.startswith("rank 1 holds up the run for 0 s; ") and found in record.message
    assert "stopped" in late_file(tmp_path, 1).read_text() and not sign_file(tmp_path, 0).exists()


def test_a_rank_in_no_collective_is_named_with_its_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Case 30."""
    waiting = {"at": "a.py:1", "waits": "all_reduce #7 (started)", "stack": ""}
    watched(
        tmp_path, monkeypatch, {**waiting, "at": "data/loader.py:9 (f)", "waits": "", "stack": "a stack\n"}, waiting
    )
    assert "rank 1 holds up the run" in caplog.text and "it hangs at data/loader.py:9 (f)\na stack" in caplog.text
    assert "rank 2 " not in caplog.text and "rank 0 " not in caplog.text


def test_ranks_in_different_collectives_are_all_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Case 31."""
    watched(tmp_path, monkeypatch, {"at": "b.py:2", "waits": "broadcast at b.py:2", "stack": ""})
    assert "rank 0 holds up the run for 0 s: it waits in all_reduce #7" in caplog.text
    assert "rank 1 holds up the run for 0 s: it waits in broadcast at b.py:2" in caplog.text


def test_one_process_names_itself_and_a_run_that_goes_on_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steps = iter(range(10**6))
    with Heartbeat(tmp_path, 0, lambda: next(steps), late_s=0.2, pending=lambda: ""):
        time.sleep(0.4)
    assert not caplog.records
    going_on: list[int] = []
    caplog.set_level(logging.INFO)
    with Heartbeat(tmp_path, 0, lambda: len(going_on), late_s=0.2, pending=lambda: ""):
        time.sleep(0.4)
        assert "it hangs at tests/tracking/test_heartbeat.py" in late_file(tmp_path, 0).read_text()
        going_on.append(1)
        time.sleep(0.1)
        assert not late_file(tmp_path, 0).exists(), "it goes on"
