"""A rank that is stopped or late is named by another one of its machine, with where it is."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tracking.heartbeat import Heartbeat, sign_file
from tracking.run_folder import write_atomically


@pytest.fixture
def reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[..., str]:
    """What rank 0 reports that waits beside ranks with these signs of life, written over and over."""

    def wait(*signs: dict) -> str:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(len(signs) + 1))
        with Heartbeat(tmp_path, 0, lambda: 1, late_s=0.3, pending=lambda: "all_reduce #7 (started)", expire=str):
            end = time.monotonic() + 0.6
            while time.monotonic() < end:
                for rank, sign in enumerate(signs, 1):
                    fresh = {"pid": os.getpid(), "host": socket.gethostname(), "due": time.time() + 9}
                    write_atomically(sign_file(tmp_path, rank), json.dumps({**fresh, **sign}))
                time.sleep(0.01)
        assert not sign_file(tmp_path, 0).exists()
        assert {vars(record)["alert"] for record in caplog.records} == {"stall"}
        return caplog.text

    return wait


def test_a_stopped_process_is_named_with_its_wait_channel(reported: Callable[..., str]) -> None:
    """Case 30."""
    with subprocess.Popen(["sleep", "60"]) as process:
        process.send_signal(signal.SIGSTOP)
        try:
            text = reported({"pid": process.pid, "due": 0})
        finally:
            process.kill()
    assert "rank 1 holds up the run for 0 s; others wait in all_reduce #7 (started): its process" in text
    assert f"{process.pid} on {socket.gethostname()} is T (stopped), in" in text


def test_a_rank_in_no_collective_is_named_with_its_stack(reported: Callable[..., str]) -> None:
    """Case 30."""
    waiting = {"at": "a.py:1", "waits": "all_reduce #7 (started)", "stack": ""}
    text = reported({"at": "data/loader.py:9 (f)", "waits": "", "stack": "a stack\n"}, waiting)
    assert "rank 1 holds up the run" in text and "it hangs at data/loader.py:9 (f)\na stack" in text
    assert "rank 2 " not in text and "rank 0 " not in text


def test_ranks_in_different_collectives_are_all_named(reported: Callable[..., str]) -> None:
    """Case 31."""
    text = reported({"at": "b.py:2", "waits": "broadcast at b.py:2", "stack": ""})
    assert "rank 0 holds up the run for 0 s: it waits in all_reduce #7" in text
    assert "rank 1 holds up the run for 0 s: it waits in broadcast at b.py:2" in text


def test_one_late_process_names_itself_and_expires_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    steps, expired = iter(range(10**6)), []
    settings = {"late_s": 0.2, "pending": lambda: "", "expire": lambda: expired.append(1)}
    with Heartbeat(tmp_path, 0, lambda: next(steps), **settings):
        time.sleep(0.5)
    assert not caplog.records and not expired
    with Heartbeat(tmp_path, 0, lambda: 1, **settings):
        time.sleep(0.6)
    assert "it hangs at tests/tracking/test_heartbeat.py" in caplog.text
    assert expired == [1]


def test_a_late_process_that_goes_on_does_not_expire(tmp_path: Path) -> None:
    expired: list[int] = []
    end = time.monotonic() + 0.8
    with Heartbeat(tmp_path, 0, lambda: 1, late_s=0.2, pending=lambda: "", expire=lambda: expired.append(1)):
        time.sleep(0.28)
        while time.monotonic() < end:
            time.sleep(0.01)
    assert not expired
