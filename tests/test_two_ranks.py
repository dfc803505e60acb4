"""What two ranks of a run have in common: their code, each update, and a save that one of them does not survive."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from launch.environment import VARIABLES, free_port
from launch.ranks import launch
from launch.sweep import code_files
from tests.conftest import ROOT, metrics, run_ranks, trained
from tests.faults import TWO, configured, disturbed, slurm_task
from tracking.run_folder import committed
from tracking.status import read_status

pytestmark = pytest.mark.slow


def test_a_peer_killed_in_a_save_is_a_crash_and_requeued(tmp_path: Path, small: list[str]) -> None:
    """Case 1: the survivor names the one that died; nothing is committed."""
    run = tmp_path / "r"
    config = configured(run, *TWO, *small, "steps=3", "valid_every=0")
    ended = run_ranks(slurm_task, 2, config, run, tmp_path, free_port(), "kill", "write", 1, 1)
    assert ended == [1, -9]
    assert [path.name for path in tmp_path.glob("requeued*")] == ["requeued0"]
    assert read_status(run)["state"] == "failed"
    assert read_status(run)["reason"].startswith("rank 1 failed first: its process ")
    assert not committed(run / "checkpoints")


def test_one_process_goes_on_as_two_ranks(tmp_path: Path, small: list[str]) -> None:
    """Case 20: with sharded optimizer states, on the same data."""
    trained(tmp_path / "whole", *small)
    (tmp_path / "stop").write_text("5")
    trained(tmp_path / "r", *small, f"checkpoint.stop_file={tmp_path / 'stop'}")
    config = configured(tmp_path / "r", *TWO, *small, "parallel=zero1")
    launch(train.work, config, tmp_path / "r", config=config.parallel)
    losses, expected = (
        {r["step"]: r["train/loss"] for r in metrics(tmp_path / name) if "train/loss" in r} for name in ("r", "whole")
    )
    assert sorted(losses) == list(range(1, 11)) and losses == pytest.approx(expected, rel=1e-5)


def test_a_nonfinite_loss_of_one_rank_is_an_update_of_none(tmp_path: Path, small: list[str]) -> None:
    """Case 40: weights that differed between the ranks would not be saved."""
    disturbed(tmp_path / "r", "poison", [*small, "valid_every=0"])
    steps = [record for record in metrics(tmp_path / "r") if "train/loss" in record]
    assert [record.get("train/nonfinite_steps", 0) for record in steps] == [0] * 3 + [1] * 7
    assert "step 4 changed nothing" in (tmp_path / "r" / "train.log").read_text()
    assert read_status(tmp_path / "r")["state"] == "finished"


SAVED = ["checkpoint.every=5", "checkpoint.asynchronous=true"]


@pytest.mark.parametrize("settings", [["checkpoint.check_replicas_every=5"], SAVED], ids=["check", "save"])
def test_a_flipped_sign_of_one_replica_is_named(settings: list[str], tmp_path: Path, small: list[str]) -> None:
    """Case 44."""
    with pytest.raises(Exception, match=r"norm.weight on ranks 0 and 1 differ"):
        disturbed(tmp_path / "r", "flip", [*small, *settings])
    assert "norm.weight on ranks 0 and 1 differ" in read_status(tmp_path / "r")["reason"]
    if settings is not SAVED:
        assert max(record["step"] for record in metrics(tmp_path / "r")) < 10, "before the last save"
    assert not committed(tmp_path / "r" / "checkpoints")


def test_a_rank_with_other_code_is_refused(tmp_path: Path, small: list[str]) -> None:
    """Case 49."""
    names = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {name for name in names if not name.startswith(("tests/", "benchmarks/"))} <= code_files().keys()
    other = tmp_path / "other"
    shutil.copytree(ROOT, other, ignore=shutil.ignore_patterns(".*", "tests", "runs", "corpora"))
    with (other / "data" / "packing.py").open("a") as file:
        file.write("# changed\n")
    argv = [sys.executable, "train.py", *small, *TWO, "name=r", f"hydra.run.dir={tmp_path / 'r'}"]
    values = [(str(rank), "2", str(rank), "2", "127.0.0.1", port) for port in [str(free_port())] for rank in (0, 1)]
    environments = [os.environ | dict(zip(VARIABLES, rank, strict=True)) for rank in values]
    ranks = [
        subprocess.Popen(argv, cwd=cwd, env=env, stderr=subprocess.PIPE, text=True)
        for cwd, env in zip((ROOT, other), environments, strict=True)
    ]
    for rank in ranks:
        assert "rank 1 has another code than rank 0; start all ranks alike" in rank.communicate()[1]
        assert rank.returncode == 1
