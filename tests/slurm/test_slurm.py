"""Jobs on a real Slurm: several nodes, failures that are reported, and runs that resume bit for bit."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conf.schema import to_config
from launch import slurm
from launch.config import LauncherConfig, Where
from launch.jobs import Job, Outcome, Point, run_jobs
from parallel.config import ParallelConfig, ParallelError
from tests.conftest import ROOT, composed_cfg, ran, trained
from tests.slurm.cluster import lost, until, why_not
from tests.test_train import assert_same_run
from tracking.status import read_status
from training.checkpoint import open_checkpoint

SLOWLY = "tests.slurm.work:train_slowly_at_first"

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(why_not()), reason=why_not() or "installed")]


def point(work: str, *args: Any, run_dir: Path, **settings: Any) -> Point:
    config = LauncherConfig(**{"where": Where.slurm, "parallel_jobs": None, "poll_s": 0.5, **settings})
    run_dir.mkdir(parents=True, exist_ok=True)
    job = Job(f"tests.slurm.work:{work}", args, run_dir, ParallelConfig(), config)
    return Point(run_dir.name, job, {"name": run_dir.name})


def outcomes_of(points: list[Point], folder: Path) -> dict[str, Outcome]:
    run_jobs(points, folder / ".jobs", ROOT)
    return {point.label: point.end for point in points if point.end is not None}


def job_of(run_dir: Path) -> str:
    path = run_dir / slurm.JOB_FILE
    return until(lambda: path.exists() and json.loads(path.read_text()))["job"]


def scontrol(*words: str) -> str:
    return subprocess.run(["scontrol", *words], capture_output=True, text=True, check=True).stdout


def test_outcomes_of_jobs_on_several_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends = ("answer", "crash", "kill", "hang")
    points = [point("end", how, run_dir=tmp_path / how, nodes=2, tasks_per_node=1) for how in ends]
    answering = points[0].job.launcher
    answering.tasks_per_node, answering.setup = 2, ["export FROM_SETUP=1"]
    answering.srun_args, answering.sbatch = ["--export=ALL,FROM_SRUN=2"], {"comment": "mine"}
    again = {"tasks_per_node": 2, "requeue_crashes": True, "max_requeues": 1}
    points.append(point("end", "crash", run_dir=tmp_path / "again", **again))
    found = outcomes_of(points, tmp_path)
    assert found["answer"] == Outcome("finished", ["4", "2", "node1", "2", "1", "2"])
    assert " Comment=mine " in scontrol("show", "job", "--oneliner", job_of(tmp_path / "answer"))
    crash = found["crash"]
    assert crash.state == "failed" and crash.reason.startswith("rank 1 failed first\nTraceback")
    assert crash.reason.count("ValueError: boom") == 1 and "tests/slurm/work.py" in crash.reason
    assert found["kill"].state == "failed" and "no result (FAILED): killed, or out of memory" in found["kill"].reason
    assert "it was requeued 1 times, and launcher.max_requeues is 1" in found["again"].reason
    out = capsys.readouterr().out
    assert "[again] attempt 0" in out and "[again] attempt 1" in out and "[crash] attempt 1" not in out
    assert found["hang"].reason.count("RuntimeError: timed out") == 1
    ids = [job_of(tmp_path / how) for how in ends]
    until(lambda: all(state in slurm.OVER for state in slurm.states(ids).values()))
    states = slurm.states(ids)
    assert [states[job_id] for job_id in ids] == ["COMPLETED", "FAILED", "FAILED", "FAILED"]
    assert "ValueError: boom" in (tmp_path / ".jobs" / f"{ids[1]}_1_log.err").read_text()


def training(run_dir: Path, settings: list[str], work: str = "train:work", *args: Any) -> Point:
    """Return a point that trains under these overrides, by `train.py` or by work that disturbs it."""
    config = to_config(composed_cfg(*settings, "launcher=slurm", "launcher.poll_s=0.5", f"name={run_dir.name}"))
    run_dir.mkdir()
    job = Job(work, (config, run_dir, *args), run_dir, config.parallel, config.launcher)
    return Point(run_dir.name, job, {"name": run_dir.name})


@contextmanager
def running(points: list[Point], folder: Path) -> Iterator[dict[str, Outcome]]:
    """Run jobs from another thread; yields their outcomes, complete when the context ends."""
    found: dict[str, Outcome] = {}
    waiting = threading.Thread(target=lambda: found.update(outcomes_of(points, folder)), daemon=True)
    with pytest.MonkeyPatch.context() as patch:  # signal handlers are the main thread's
        patch.setattr("launch.jobs.handle", lambda *_: {})  # this is no main thread
        waiting.start()
        yield found
        waiting.join(500)
    assert not waiting.is_alive()


def attempts(run_dir: Path) -> list[int]:
    """Return the attempts at a run, as every rank noted them."""
    path = run_dir / "attempts"
    return sorted({int(word) for word in path.read_text().split()}) if path.exists() else []


def steps_of(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.timeout(600)
def test_requeue_time_limit_and_preemption_resume_bit_for_bit(tmp_path: Path, small: list[str]) -> None:
    """One on two nodes is requeued by hand, one at its time limit, one is preempted; one is cancelled."""
    settings = [*small, "steps=30", "checkpoint.every=0", "valid_every=5", "parallel.threads=2"]
    hybrid = ["parallel=hybrid_zero", "parallel.dp_shard=2", "data.micro_batch_size=1", "parallel.threads=1"]
    two_nodes = [*settings, "launcher.nodes=2", "launcher.tasks_per_node=2", *hybrid]
    short = ["launcher.time=00:20:00", "launcher.signal_delay_s=10", "+launcher.sbatch.nodelist=node1"]
    gpus = ["launcher.gpus_per_node=2", "launcher.tasks_per_node=1", "+launcher.sbatch.nodelist=node2"]
    urgent = ["sbatch", "--partition=high", "--nodelist=node2", "--gres=gpu:2", "--time=1", "--output=/dev/null"]
    points = [
        training(tmp_path / "hybrid", two_nodes, SLOWLY),
        training(tmp_path / "undisturbed", two_nodes),
        training(tmp_path / "limited", [*settings, *short], SLOWLY),
        training(tmp_path / "preempted", [*settings, *gpus], SLOWLY),
        point("wait_for_cancel", tmp_path / "cancelled", run_dir=tmp_path / "cancelled"),
    ]
    with running(points, tmp_path) as found:
        until((tmp_path / "cancelled" / "begun0").exists)
        subprocess.run(["scancel", job_of(tmp_path / "cancelled")], check=True)
        until(lambda: steps_of(tmp_path / "limited"))
        limited = job_of(tmp_path / "limited")
        scontrol("update", f"JobId={limited}", "EndTime=now+40")  # Slurm looks at limits every 30 s
        for name in ("hybrid", "preempted"):
            until(lambda name=name: steps_of(tmp_path / name))
        scontrol("requeue", job_of(tmp_path / "hybrid"))
        subprocess.run([*urgent, "--wrap=sleep 1"], check=True, capture_output=True)
        until(lambda: " Restarts=1 " in scontrol("show", "job", "--oneliner", limited))
        subprocess.run(["scontrol", "update", f"JobId={limited}", "TimeLimit=00:20:00"])  # if it is not over already
    assert found["cancelled"].state == "stopped" and (tmp_path / "cancelled" / "saved").exists()
    assert not (tmp_path / "cancelled" / "begun1").exists()
    trained(tmp_path / "whole", *settings)
    for name, reference in {"hybrid": "undisturbed", "limited": "whole", "preempted": "whole"}.items():
        assert attempts(tmp_path / name)[:2] == [0, 1] and found[name].state == "finished", (name, found[name])
        assert "resumed from" in (tmp_path / name / "train.log").read_text()
        assert_same_run(tmp_path / name, tmp_path / reference)
        assert open_checkpoint(tmp_path / name).step == 30
    assert {f"train.rank{rank}.log" for rank in (1, 2, 3)} <= {path.name for path in (tmp_path / "hybrid").iterdir()}


def test_a_lost_node_resumes_bit_for_bit(tmp_path: Path, small: list[str]) -> None:
    settings = [*small, "steps=8", "checkpoint.every=3", "parallel=zero1", "parallel.threads=1"]
    two_nodes = ["launcher.nodes=2", "launcher.tasks_per_node=1"]
    run = training(tmp_path / "run", [*settings, *two_nodes], SLOWLY, 4)
    with running([run], tmp_path) as found:
        until(lambda: steps_of(tmp_path / "run") == 4)
        with lost("node2"):
            until(lambda: slurm.states([job_of(tmp_path / "run")]).popitem()[1] == "PENDING")
    assert found["run"].state == "finished" and attempts(tmp_path / "run") == [0, 1], found
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"resumed from {tmp_path / 'run' / 'checkpoints' / 'step-00000003'}\n" in log
    assert log.count("step 4/8") == 2, "the step after it was lost"
    here = [sys.executable, "train.py", *settings, "parallel.nproc_per_node=2", f"hydra.run.dir={tmp_path / 'whole'}"]
    subprocess.run(here, cwd=ROOT, check=True, capture_output=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_ends_of_requeueing(tmp_path: Path, small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*small, "steps=8", "parallel.threads=1"]
    crashing = [*settings, "launcher.requeue_crashes=true"]
    points = [
        training(tmp_path / "crashing", crashing, "tests.slurm.work:train_and_crash"),
        training(tmp_path / "signalled", [*settings, "launcher.max_requeues=0"], SLOWLY),
    ]
    with running(points, tmp_path) as found:
        until(lambda: steps_of(tmp_path / "signalled"))
        subprocess.run(["scancel", "--signal=USR2", job_of(tmp_path / "signalled")], check=True)
    assert attempts(tmp_path / "crashing") == [0, 1, 2], "the second crash came at another step, the third did not"
    reason = found["crashing"].reason
    assert "ValueError: boom" in reason and reason.endswith("not requeued: it crashed twice at the same step"), reason
    assert attempts(tmp_path / "signalled") == [0] and found["signalled"].state == "stopped"
    assert 0 < open_checkpoint(tmp_path / "signalled").step < 8
    message = "[signalled] not requeued: it was requeued 0 times, and launcher.max_requeues is 0"
    assert message in capsys.readouterr().out


def test_what_slurm_refuses_is_an_error(tmp_path: Path) -> None:
    for settings, refused in (
        ({"partition": "nowhere"}, "invalid partition specified: nowhere"),
        ({"nodes": 2, "gpus_per_node": 3}, "Requested node configuration is not available|More processors requested"),
    ):
        with pytest.raises(ParallelError, match=refused):
            outcomes_of([point("end", "answer", run_dir=tmp_path / "refused", **settings)], tmp_path)


def test_a_sweep_runs_only_what_is_missing(tmp_path: Path, small: list[str]) -> None:
    settings = [*small, "steps=3", "optimizer.max_nonfinite_steps=1", "name=s", f"hydra.sweep.dir={tmp_path}"]
    two_tasks = ["launcher.tasks_per_node=2", "parallel=zero1", "parallel.threads=1", "launcher.poll_s=0.5"]
    argv = ["train.py", *settings, "launcher=slurm", *two_tasks]
    done = ran(*argv, "optimizer.lr=1e-3,1e30", code=1)
    assert "error: optimizer.lr=1e+30 failed: " in done.stderr
    assert done.stderr.count("1 steps in a row had no finite gradient") == 1
    assert done.stderr.endswith("error: 1 of 2 points did not finish: optimizer.lr=1e+30\n")
    assert {"table.md", "loss.png", "final.png"} == {path.name for path in (tmp_path / "compare").iterdir()}
    done = ran(*argv, "optimizer.lr=1e-3,1e-2")
    assert done.stdout.count("finished already: ") == 1 and done.stdout.count("is submitted: ") == 1


def test_a_job_outlives_its_client_and_is_found_again(tmp_path: Path, small: list[str]) -> None:
    settings = [*small, "steps=1000000", "logger.every=20", "name=left", f"hydra.sweep.dir={tmp_path}"]
    argv = [sys.executable, "train.py", *settings, "launcher=slurm", "launcher.poll_s=0.5", "parallel.threads=1"]
    client = subprocess.Popen(argv, cwd=ROOT)
    until(lambda: client.poll() is not None or steps_of(tmp_path))
    client.kill()  # as when a terminal closes
    client.wait()
    client = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert client.stdout is not None
    job = job_of(tmp_path)
    assert client.stdout.readline() == f"job {job} is already in the queue: {os.path.relpath(tmp_path, ROOT)}\n"
    client.send_signal(signal.SIGINT)
    printed = client.communicate(timeout=150)[1]
    assert client.returncode == 130 and f"cancelled {job}; the same command resumes" in printed
    until(lambda: slurm.states([job]) == {job: "CANCELLED"})
    until(lambda: read_status(tmp_path)["state"] == "stopped")
    assert open_checkpoint(tmp_path).step > 0


def test_srun_starts_the_ranks_of_one_run(tmp_path: Path, small: list[str]) -> None:
    ranks = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "train.py"]
    settings = [*small, "steps=2", "name=r", "parallel=ddp", "parallel.threads=1", f"hydra.run.dir={tmp_path / 'r'}"]
    done = subprocess.run([*ranks, *settings], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2/2") == 1 and (tmp_path / "r" / "train.rank1.log").exists()
    wrong = subprocess.run([*ranks, *settings, "optimizer.lr=-1"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("optimizer.lr (-1.0) must be positive") == 1
