"""A rank that hangs, is stopped or is slow, in runs of two ranks: who it is stands in the log."""

import re
from pathlib import Path

import pytest
import torch

from launch.config import RankError
from tests.faults import disturbed
from tracking.metrics_file import read_records
from tracking.status import read_status

pytestmark = pytest.mark.slow  # ranks that start, a timeout that passes


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        pytest.param("hang", r"it hangs at tests/faults.py:\d+ \(hang\)\n(.|\n)*time.sleep\(3600\)", id="hang"),
        pytest.param("stop", r"its process \d+ on \S+ is T \(stopped\), in \S+ of the kernel", id="stop"),
    ],
)
def test_a_rank_that_hangs_is_named_before_the_timeout(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch, fault: str, where: str
) -> None:
    """Case 30: with where it is, and the collective that the other one waits in."""
    monkeypatch.setattr("launch.ranks.GRACE_S", 0.5)
    with pytest.raises(RankError, match="rank 1 failed first: its process|rank 1 failed first\n"):
        disturbed(tmp_path / "r", fault, [*small, "parallel.step_timeout_s=6"])
    log, status = (tmp_path / "r" / "train.log").read_text(), read_status(tmp_path / "r")
    others = r"others wait in all_reduce at parallel/mesh.py:\d+ \(all_counts\): "
    named = re.search(rf"rank 1 holds up the run for \d+ s; {others}{where}", log)
    assert named and named.start() < log.index("failed first"), log
    assert status["state"] == "failed" and re.match("rank 1 failed first: it(s process| hangs at)", status["reason"])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    ("fault", "graphs", "waits", "where"),
    [
        pytest.param("hang_in_pass", False, r"nccl:\w+ #\d+", "tests/faults.py", id="device"),
        pytest.param("hang", True, r"all_reduce at parallel/mesh.py", "tests/faults.py", id="host"),
        pytest.param("spin", True, "", "training/", id="graph"),  # a replayed graph's collectives are not known
    ],
)
def test_a_rank_that_the_other_gpu_waits_for_is_named(
    tmp_path: Path, small: list[str], fault: str, graphs: bool, waits: str, where: str
) -> None:
    """Case 30."""
    settings = [
        *small, "parallel.device=cuda", "parallel.step_timeout_s=30", f"parallel.cuda_graphs={graphs}", "precision=bf16",
        "model.attention=varlen",
    ]  # fmt: skip
    with pytest.raises(RankError, match="rank 1 failed first"):
        disturbed(tmp_path / "r", fault, settings)
    log, status = (tmp_path / "r" / "train.log").read_text(), read_status(tmp_path / "r")
    assert re.search(rf"rank 1 holds up the run for \d+ s.*{waits}", log), log
    assert status["state"] == "failed"
    assert status["reason"].startswith(f"rank 1 failed first: it hangs at {where}"), status


def test_a_rank_whose_loader_is_slow_is_the_slowest(tmp_path: Path, small: list[str]) -> None:
    disturbed(tmp_path / "r", "drag", [*small, "steps=20", "valid_tokens=128"])
    last = [r for r in read_records(tmp_path / "r" / "metrics.jsonl") if "perf/slowest_rank" in r][-1]
    assert last["perf/slowest_rank"] == 1 and last["perf/slowest_rank_s"] > 0.2 > last["perf/own_s"]
    log = (tmp_path / "r" / "train.log").read_text()
    assert log.count("rank 1 has slowed down the others for 10 steps: data and first forward take") == 1
