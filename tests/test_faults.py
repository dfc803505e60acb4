"""Two ranks, one of which fails, dies, hangs, or is asked to stop."""

from pathlib import Path

import pytest

from launch.config import RankError
from tests.conftest import metrics
from tests.faults import disturbed
from tracking.compare import compare
from tracking.status import read_status
from training.checkpoint import open_checkpoint


@pytest.mark.parametrize(
    ("fault", "rank", "reason"),
    [
        ("fail", 1, "rank 1 failed first: ValueError: boom"),
        pytest.param("kill", 0, "rank 0 failed first: its process ", marks=pytest.mark.slow),
        pytest.param("disagree", 1, "rank 0 failed first: RuntimeError: ", marks=pytest.mark.slow),
    ],
)
def test_first_failed_rank_is_named(tmp_path: Path, small: list[str], fault: str, rank: int, reason: str) -> None:
    """Cases 29 and 31; a rank that hangs or is stopped is in tests/tracking/test_heartbeat.py."""
    run = tmp_path / "r"
    with pytest.raises(RankError, match="rank 0 died first: SIGKILL" if fault == "kill" else "rank . failed first"):
        disturbed(run, fault, [*small, "parallel.step_timeout_s=6"], rank=rank)
    status = read_status(run)
    assert status["state"] == "failed" and reason in status["reason"]
    assert "ValueError: boom" in status["traceback"] or fault != "fail"
    assert status["reason"] in compare(tmp_path)
    for log in ["train.log", "train.rank1.log"] if fault == "fail" else ["train.rank1.log" if rank == 0 else "train.log"]:  # fmt: skip
        assert (run / log).read_text().splitlines()[-1].endswith(status["reason"])
    log = (run / "train.log").read_text()
    if fault == "disagree":
        assert "it waits in broadcast at tests/faults.py" in log and "it waits in all_reduce at parallel" in log
    assert "step 3/" not in (run / "train.rank1.log").read_text(), "only the first rank's log has the steps"


@pytest.mark.parametrize(("moment", "n", "step", "saves"), [("validation", 11, 4, 1), ("save", 1, 6, 1)])
def test_a_signal_to_one_rank(tmp_path: Path, small: list[str], moment: str, n: int, step: int, saves: int) -> None:
    """Cases 33, 35 and 36."""
    settings = [*small, "steps=40", "valid_every=4", "checkpoint.every=6", "checkpoint.keep=0"]
    with pytest.raises(SystemExit) as stopped:
        disturbed(tmp_path / "r", "terminate", settings, moment=moment, n=n)
    assert stopped.value.code == 143
    assert (
        open_checkpoint(tmp_path / "r").step == step and len(list((tmp_path / "r/checkpoints").glob("step-*"))) == saves
    )
    assert moment != "validation" or not any("valid/loss" in record for record in metrics(tmp_path / "r"))
    status = read_status(tmp_path / "r")
    assert status["state"] == "stopped" and status["reason"] == f"SIGTERM on rank 1, saved at step {step}"
    other = (tmp_path / "r" / "train.rank1.log").read_text()
    assert "(most recent call first)" in other and f"SIGTERM on rank 1, seen at step {step}" in other
