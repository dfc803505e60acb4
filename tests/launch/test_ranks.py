"""Ranks are spawned or joined, fail together, and none is left behind."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from corpus.config import DataError
from launch.config import LauncherConfig, RankError, Where
from launch.environment import DEFAULTS, PORTS, VARIABLES, first_host, joined_environment, nproc_per_node, world_size
from launch.jobs import Job, Point, free_gpus, run_jobs
from launch.ranks import launch
from parallel.config import Device, ParallelConfig, ParallelError
from tests.conftest import ROOT
from tests.parallel import ranks


def children() -> list[psutil.Process]:
    """The ranks that this process has spawned."""
    return [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]


def test_spawned_ranks_have_their_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    answer = ranks.launched(3, ranks.variables)
    assert int(answer.pop("MASTER_PORT")) in PORTS
    world = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
    assert answer == {**world, **DEFAULTS} and not children()


def test_one_rank_runs_in_this_process() -> None:
    assert ranks.launched(1, os.getpid) == os.getpid()
    assert launch(os.getpid, config=ParallelConfig()) == os.getpid()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", r"^error: rank 1 failed first\nTraceback(.|\n)*ranks.py(.|\n)*ValueError: boom\n$"),
        ("kill", "^error: rank 1 died first: SIGKILL; "),
        ("hang", r"^error: rank 0 failed first(.|\n)*timed out"),
    ],
)
def test_a_failing_rank_ends_all(how: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases 29 and 30."""
    monkeypatch.setattr("launch.ranks.GRACE_S", 0.5)
    started = time.monotonic()
    with pytest.raises(RankError, match=message) as failure:
        ranks.launched(2, ranks.fail, 1, how)
    assert str(failure.value).count("Traceback") == (how in ("raise", "hang"))
    assert time.monotonic() - started < 50 and not children()


def test_a_user_error_keeps_its_type() -> None:
    with pytest.raises(DataError, match="^there is no such corpus$"):
        ranks.launched(2, ranks.fail, 0, "user error")


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code", "saved"), [(signal.SIGINT, 130, 2), (signal.SIGKILL, -9, 0)])
def test_ranks_receive_the_parents_signals_and_die_with_it(tmp_path: Path, signum: int, code: int, saved: int) -> None:
    """Case 32."""
    command = [sys.executable, "-m", "tests.parallel.ranks", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while len(list(tmp_path.glob("started*"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)
    pids = [int(path.read_text()) for path in tmp_path.glob("started*")]
    os.kill(process.pid, signal.SIGUSR1)  # only for stacks
    os.killpg(process.pid, signum)  # as Ctrl-C in a terminal
    printed = process.communicate(timeout=20)[1]
    assert process.returncode == code
    assert printed.count("stopping after this step") == (code > 0) and "Traceback" not in printed
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
    hosts = ("n1", "n[3-9],m1", "a[007]-ib", "x-1-2,x-1-3")
    assert [first_host(short) for short in hosts] == ["n1", "n3", "a007-ib", "x-1-2"]


def join(monkeypatch: pytest.MonkeyPatch, **changes: str) -> dict[str, str]:
    values = dict(zip(VARIABLES, ("0", "2", "0", "2", "127.0.0.1", "1234"), strict=True)) | changes
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return values


def test_variables_of_torchrun_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    values = join(monkeypatch)
    answer = launch(ranks.variables, config=ParallelConfig(nproc_per_node=7))
    assert {name: answer[name] for name in VARIABLES} == values
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ParallelError, match="WORLD_SIZE must be set with RANK, LOCAL_RANK"):
        launch(os.getpid, config=ParallelConfig())


def test_more_ranks_than_gpus_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.environment.visible_gpus", lambda: 2)
    for config, launcher, message in (
        (ParallelConfig(nproc_per_node=4), None, r"parallel.nproc_per_node \(4\) must be at most the GPUs \(2\)"),
        (ParallelConfig(tp=2, pp=2), None, r"parallel.pp \(2\) x parallel.tp \(2\) must be at most the GPUs"),
        (ParallelConfig(tp=2), LauncherConfig(parallel_jobs=2), r"parallel.tp \(2\) .* \(launcher.parallel_jobs\) \(1"),
    ):
        with pytest.raises(ParallelError, match=message):
            nproc_per_node(config, launcher)
    join(monkeypatch, LOCAL_RANK="3", LOCAL_WORLD_SIZE="4", WORLD_SIZE="4", RANK="3")
    with pytest.raises(ParallelError, match=r"LOCAL_WORLD_SIZE \(4\)"):
        ranks.launched(4, os.getpid)


@pytest.mark.parametrize(
    ("dry", "launcher", "expected"),
    [(64, {}, 64), (0, {}, 3), (0, {"where": Where.slurm, "nodes": 2, "gpus_per_node": 8}, 16)],
)
def test_world_size(monkeypatch: pytest.MonkeyPatch, dry: int, launcher: dict[str, Any], expected: int) -> None:
    sections = {"dry_run": SimpleNamespace(enabled=bool(dry), world_size=dry), "launcher": LauncherConfig(**launcher)}
    config: Any = SimpleNamespace(parallel=ParallelConfig(device=Device.cpu, tp=3), **sections)
    assert world_size(config) == expected
    join(monkeypatch, WORLD_SIZE="2")
    assert world_size(config) == (dry or 2)


def point(folder: Path, work: str, config: LauncherConfig) -> Point:
    return Point(work, Job(work, (), folder, ParallelConfig(device=Device.cpu), config), {})


def test_jobs_share_the_gpus_of_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("environment", "jobs"):
        monkeypatch.setattr(f"launch.{module}.visible_gpus", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "8,9,10,11,12,13,14,15")
    pair = LauncherConfig(parallel_jobs=4)
    assert nproc_per_node(ParallelConfig(dp_replicate=-1), pair) == 2
    new = point(tmp_path, "os:getpid", pair)
    started: Any = SimpleNamespace()
    running = [replace(new, process=started, gpus=gpus) for gpus in ([8, 9], [12, 13])]
    assert free_gpus(new, running) == [10, 11]
    new.job.launcher = LauncherConfig(parallel_jobs=2, gpus_per_node=6)
    assert free_gpus(new, running) is None, "it waits until enough are free"
    new.job.launcher = LauncherConfig(gpus_per_node=9)
    with pytest.raises(ParallelError, match=r"launcher.gpus_per_node \(9\)"):
        free_gpus(new, running)
    assert LauncherConfig(parallel_jobs=None).gpus_per_job(8) == 1 and pair.gpus_per_job(0) == 0


def test_jobs_of_this_machine_are_reported_by_how_they_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside.py").write_text("from os import getpid\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # jobs find code of the user's own
    both = LauncherConfig(parallel_jobs=2)
    points = [point(tmp_path, work, both) for work in ("outside:getpid", "tests.parallel.ranks:variables")]
    run_jobs(points, tmp_path / ".jobs", ROOT)
    finished, failed = (point.end for point in points)
    assert finished is not None and failed is not None
    assert finished.state == "finished" and finished.value not in (None, os.getpid())
    assert failed.state == "failed" and failed.reason.endswith("KeyError: 'RANK'")


@pytest.mark.parametrize(("signum", "cancelled"), [(signal.SIGHUP, []), (signal.SIGTERM, [("scancel", "7")])])
def test_jobs_in_slurm_outlive_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int, cancelled: list[tuple[str, ...]]
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr("launch.slurm.queued_job", lambda *_: "7")
    monkeypatch.setattr("launch.slurm.ask", lambda *command: asked.append(command))
    monkeypatch.setattr("launch.slurm.states", lambda _: os.kill(os.getpid(), signum))
    waiting = point(tmp_path, "os:getpid", LauncherConfig(where=Where.slurm))
    with pytest.raises(SystemExit):
        run_jobs([waiting], tmp_path / ".jobs", ROOT)
    assert asked == cancelled
