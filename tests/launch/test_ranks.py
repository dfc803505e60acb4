"""Ranks are started and joined by their variables, fail as one, and none is left behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from corpus.config import DataError
from launch.config import LauncherConfig, RankError
from launch.jobs import Job, Point, Running, free_gpus
from launch.ranks import PORTS, first_host, joined_environment, launch, nproc_per_node
from parallel.config import ParallelConfig, ParallelError
from tests.conftest import ROOT
from tests.parallel import ranks


def children() -> list[psutil.Process]:
    """Processes of ours but multiprocessing's tracker, which lives as long as its parent."""
    return [p for p in psutil.Process().children() if "resource_tracker" not in " ".join(p.cmdline())]


def test_ranks_are_started_with_their_variables_and_rank_0_answers() -> None:
    answer = ranks.launched(3, ranks.variables)
    assert int(answer.pop("MASTER_PORT")) in PORTS
    world = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
    assert answer == world and not children()


def test_one_process_runs_here() -> None:
    assert ranks.launched(1, os.getpid) == os.getpid()
    assert launch(os.getpid, config=ParallelConfig(), is_user_error=bool) == os.getpid()  # no GPU, nothing asked for


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raise", r"^error: rank 1 failed first\nTraceback(.|\n)*ranks.py(.|\n)*ValueError: boom\n$"),
        ("kill", "^error: rank 1 died first: SIGKILL; the system may have run out of memory$"),
        ("exit", "^error: rank 1 died first: exit code 3$"),
        ("hang", r"^error: rank 0 failed first(.|\n)*timed out(.|\n)*\nrank 1 hung; it stood at\n(.|\n)*in fail\n"),
    ],
)
def test_a_failing_rank_ends_all_and_is_told_once(how: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.ranks.LAST_WORDS_S", 0.5)
    monkeypatch.setattr("launch.ranks.KILL_S", 0.3)
    started = time.monotonic()
    with pytest.raises(RankError, match=told) as failure:
        ranks.launched(2, ranks.fail, 1, how)
    assert str(failure.value).count("Traceback") == (how in ("raise", "hang"))
    assert time.monotonic() - started < 30 and not children()


def test_an_error_that_is_a_sentence_stays_what_it_is() -> None:
    with pytest.raises(DataError, match="^there is no such corpus$"):
        ranks.launched(2, ranks.fail, 0, "sentence")


@pytest.mark.parametrize(
    ("signum", "code", "saved"), [(signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 2), (signal.SIGKILL, -9, 0)]
)
def test_the_parents_signals_reach_the_ranks_and_none_is_left(
    tmp_path: Path, signum: int, code: int, saved: int
) -> None:
    command = [sys.executable, "-m", "tests.parallel.ranks", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while len(list(tmp_path.glob("started*"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)
    pids = [int(path.read_text()) for path in tmp_path.glob("started*")]
    os.killpg(process.pid, signum)  # as Ctrl-C in a terminal
    told = process.communicate(timeout=20)[1]
    assert process.returncode == code
    assert told.count("stopping after this step") == (code > 0) and "Traceback" not in told
    assert len(list(tmp_path.glob("saved*"))) == saved
    psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], 5)
    assert not any(psutil.pid_exists(pid) for pid in pids)


SRUN = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "gpu[08-09,11],big3",
}  # fmt: skip


def test_a_task_of_srun_is_a_rank() -> None:
    found = joined_environment(SRUN)
    port = int(found.pop("MASTER_PORT"))
    assert port in PORTS and port == int(joined_environment({**SRUN, "SLURM_PROCID": "1"})["MASTER_PORT"])
    assert found == {
        "RANK": "4", "WORLD_SIZE": "5", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "gpu08"
    }  # fmt: skip
    second = {**SRUN, "SLURM_NODEID": "1", "SLURM_LOCALID": "1", "SLURM_PROCID": "3"}
    assert joined_environment(second)["LOCAL_RANK"] == "1"
    assert joined_environment({**second, "CUDA_VISIBLE_DEVICES": "1"})["LOCAL_RANK"] == "0", "its only GPU is index 0"
    assert joined_environment({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == {}, "a batch script is no rank"


@pytest.mark.parametrize(
    ("short", "host"), [("n1", "n1"), ("n[3-9],m1", "n3"), ("a[007]-ib", "a007-ib"), ("x-1-2,x-1-3", "x-1-2")]
)
def test_the_first_host_of_a_list_is_the_master(short: str, host: str) -> None:
    assert first_host(short) == host


GOOD = {
    "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"RANK": "2"}, r"RANK \(2\) must be below WORLD_SIZE \(2\)"),
        ({"WORLD_SIZE": "two"}, r"WORLD_SIZE \(two\) must be a number"),
        ({"LOCAL_RANK": "2"}, r"LOCAL_RANK \(2\) must be below LOCAL_WORLD_SIZE \(2\)"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE must be set beside RANK, LOCAL_RANK"),
        ({"MASTER_PORT": "busy"}, r"MASTER_PORT \(\d+\) is in use on"),
    ],
)
def test_variables_that_make_no_rank_are_refused_in_a_sentence(
    change: dict, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        for name, value in {**GOOD, **change}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(taken.getsockname()[1]) if value == "busy" else value)
        with pytest.raises(ParallelError, match=sentence):
            launch(os.getpid, config=ParallelConfig(), is_user_error=bool)


def test_joined_variables_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    assert launch(ranks.variables, config=ParallelConfig(nproc_per_node=7), is_user_error=bool) == GOOD


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.ranks.visible_gpus", lambda: 2)
    with pytest.raises(ParallelError, match=r"parallel.nproc_per_node \(4\) must be at most the number of GPUs here"):
        ranks.launched(4, os.getpid)
    with pytest.raises(
        ParallelError, match=r"parallel.pp \(2\) x parallel.tp \(2\) must be at most the number of GPUs"
    ):
        nproc_per_node(ParallelConfig(tp=2, pp=2))
    with pytest.raises(
        ParallelError, match=r"parallel.tp \(2\) must be at most a job's share \(launcher.parallel_jobs\)"
    ):
        nproc_per_node(ParallelConfig(tp=2), LauncherConfig(parallel_jobs=2))
    for name, value in {**GOOD, "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4", "RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ParallelError, match=r"LOCAL_WORLD_SIZE \(4\) ranks .* a machine with 2 GPUs"):
        ranks.launched(4, os.getpid)


def test_jobs_at_once_share_the_gpus_of_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("launch.ranks.visible_gpus", lambda: 8)
    monkeypatch.setattr("launch.jobs.visible_gpus", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "8,9,10,11,12,13,14,15")
    pair = LauncherConfig(parallel_jobs=4)
    assert nproc_per_node(ParallelConfig(dp_replicate=-1), pair) == 2
    job = Job("os:getpid", (), ParallelConfig(), bool, pair, hopeless=bool)
    point = Point("p", tmp_path, pair, {}, job)
    running = [Running(point, "1", tmp_path, "", gpus=[8, 9]), Running(point, "2", tmp_path, "", gpus=[12, 13])]
    assert free_gpus(point, running) == [10, 11]
    point.launcher = LauncherConfig(parallel_jobs=2, gpus_per_node=6)
    assert free_gpus(point, running) is None, "it waits until enough are free"
    point.launcher = LauncherConfig(gpus_per_node=9)
    with pytest.raises(ParallelError, match=r"launcher.gpus_per_node \(9\) must be at most the number of GPUs here"):
        free_gpus(point, running)
    assert LauncherConfig(parallel_jobs=None).gpus_of_a_job(8) == 1 and pair.gpus_of_a_job(0) == 0
