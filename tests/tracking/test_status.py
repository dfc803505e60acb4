"""How a run ended, how often it crashed, and when early_stop ends it."""

import json
import shutil
import socket
import time
from pathlib import Path

import pytest

from launch.config import RankError
from launch.sweep import is_finished
from tests.tracking.test_compare import written
from tracking.compare import read_runs
from tracking.config import EarlyStopConfig
from tracking.early_stop import is_hopeless
from tracking.heartbeat import sign_file
from tracking.metrics_file import last_value
from tracking.run_folder import locked
from tracking.status import Status, crashed_the_same_way_twice, note_end, read_status
from training.config import CheckpointError


def test_early_stop_compares_at_the_same_tokens(tmp_path: Path) -> None:
    best = written(tmp_path / "best", [5.0, 4.0, 3.0, 2.0, 1.0])
    rule = EarlyStopConfig(margin=0.5, after_step=2, every=1)
    same = written(tmp_path / "same", [5.0, 4.0])
    assert not is_hopeless(rule, same, 2), "behind the best's end, but not at the same tokens"
    worse = written(tmp_path / "worse", [6.0, 5.5])
    assert is_hopeless(rule, worse, 2) and not is_hopeless(rule, best, 5)
    assert not is_hopeless(rule, worse, 1) and not is_hopeless(EarlyStopConfig(), worse, 2)
    assert is_hopeless(rule, written(tmp_path / "nan", [5.0, None]), 2)
    assert not is_hopeless(rule, written(tmp_path / "ahead", [9.0] * 9), 9), "no other has come that far"


def test_early_stop_and_objective_take_any_metric(tmp_path: Path) -> None:
    good, bad = (
        written(tmp_path / f"{acc}", [1.0], {"step": 2, "evaluation/own/acc": acc, "valid/loss": None})
        for acc in (0.9, 0.2)
    )
    rule = EarlyStopConfig(margin=0.5, after_step=1, every=1, metric="-evaluation/own/acc")
    assert is_hopeless(rule, bad, 2) and not is_hopeless(rule, good, 2)
    keys = ("evaluation/own/acc", "-evaluation/own/acc", "valid/loss", "evaluation/none/acc")
    assert [last_value(bad, key) for key in keys] == [0.2, -0.2, None, None]


def test_a_held_run_is_running_and_a_refused_one_keeps_its_status(tmp_path: Path) -> None:
    run = written(tmp_path / "r", [1.0], seed=1)
    before = read_status(run)
    with pytest.raises(CheckpointError), Status(run, {"name": "s", "steps": 1, "seed": 2}):
        raise CheckpointError("another configuration")
    assert {**read_status(run), "time": 0} == {**before, "time": 0} and before["state"] == "finished"
    with locked(run), Status(run, {"steps": 1}):
        note_end(run, "failed", "another process holds it")
        assert read_runs(tmp_path)[0].state == "running"


def test_a_finished_run_is_known_without_its_secrets(tmp_path: Path) -> None:
    config = {"steps": 1, "data": {"input": "https://me:hunter2@x/a"}, "alerts": {"command": 'webhook "http://x/a" "'}}
    run = written(tmp_path / "r", [1.0], **config)
    assert read_status(run)["config"]["data"] == {"input": "https://me:***@x/a"}
    assert is_finished(run, {"name": "s", **config}) and not is_finished(run, {"name": "s", **config, "seed": 1})


def test_two_equal_crashes_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(attempt: int, error: Exception, rank: int = 0, job: int = 1) -> None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(attempt))
        monkeypatch.setenv("SLURM_JOB_ID", str(job))
        with pytest.raises(type(error)), Status(tmp_path, {}, rank=rank):
            raise error

    crash(0, ValueError("boom"), rank=1)
    crash(0, RuntimeError("connection closed by peer"))
    assert not crashed_the_same_way_twice(tmp_path), "two ranks in one attempt"
    crash(1, RuntimeError("another"))
    assert not crashed_the_same_way_twice(tmp_path)
    crash(2, RuntimeError("another"))
    assert crashed_the_same_way_twice(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n{"step": 8, "train/lo')
    crash(3, RuntimeError("another"))
    assert not crashed_the_same_way_twice(tmp_path), "it got further"
    crash(4, RuntimeError("another"))
    assert crashed_the_same_way_twice(tmp_path)
    crash(0, RuntimeError("a third"), job=2)
    assert not crashed_the_same_way_twice(tmp_path), "the first attempt of another job"


def test_a_start_after_a_kill_is_an_alert(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Status(tmp_path, {}).__enter__()  # killed
    assert not caplog.records
    for rank in (1, 0, 0):
        with Status(tmp_path, {"steps": 1}, rank=rank, ranks=2) as status:
            status.end(None, stopped=False, given_up=False, saved_step=1)
    (alert,) = (record for record in caplog.records if hasattr(record, "alert"))
    assert vars(alert)["alert"] == "crash" and "the last attempt ended without a word" in alert.getMessage()


def test_a_symptom_gives_way_to_the_cause_on_another_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 29."""
    monkeypatch.setattr("tracking.status.CAUSE_S", 0.1)
    lost = RuntimeError("Connection closed by peer")

    def other_rank_fails(error: Exception) -> None:
        with pytest.raises(type(error)), Status(tmp_path, {}, rank=1, ranks=2):
            raise error

    with (
        pytest.raises(RankError, match="^error: rank 1 failed first\nTraceback(.|\n)*ValueError: boom"),
        Status(tmp_path, {}, ranks=2),
    ):
        other_rank_fails(ValueError("boom"))
        raise lost
    assert read_status(tmp_path)["reason"] == "rank 1 failed first: ValueError: boom"
    with pytest.raises(RuntimeError, match="closed by peer"), Status(tmp_path, {}, ranks=2):
        raise lost  # what an earlier attempt ended by is no cause
    with pytest.raises(RuntimeError, match="DataLoader timed out"), Status(tmp_path, {}, ranks=2):
        raise RuntimeError("DataLoader timed out after 3 seconds")


def test_a_rank_that_died_without_a_word_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 29."""
    monkeypatch.setattr("tracking.status.CAUSE_S", 0.1)
    (tmp_path / ".ranks").mkdir()
    for host, text in ((socket.gethostname(), "was killed, or ran out of memory"), ("n7", "nothing more came from n7")):
        sign = {"pid": 2**22 + 1, "host": host, "due": time.time() + 60}
        sign_file(tmp_path, 0).write_text(json.dumps(sign))
        with pytest.raises(RankError, match=text), Status(tmp_path, {}, rank=1, ranks=2):
            raise RuntimeError("Connection closed by peer")
        assert "rank 0 failed first" in read_status(tmp_path)["reason"], "the first rank that is left writes it"


def test_an_error_is_not_hidden_by_a_folder_that_has_vanished(tmp_path: Path) -> None:
    run = tmp_path / "r"
    run.mkdir()
    with pytest.raises(ValueError, match="boom"), Status(run, {}):
        shutil.rmtree(run)
        raise ValueError("boom")
