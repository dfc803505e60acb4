"""Sweeps on this machine: all points or none, each a job, nothing twice, and a comparison at the end."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.utils import JobStatus
from omegaconf import OmegaConf

from conf.schema import TrainConfig
from hydra_plugins.sweeps import OptunaSweeper
from launch import slurm
from launch.jobs import Outcome, Point
from launch.sweep import keep_code, run_points, share_cores
from parallel.config import ParallelError
from tests.conftest import ROOT, metrics, ran
from tests.test_preflight import points
from tracking.run_folder import is_held
from tracking.status import read_status

pytestmark = pytest.mark.slow


def sweep(folder: Path, *overrides: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    argv = ["train.py", "-m", *overrides, "name=sweep", f"hydra.sweep.dir={folder}", "parallel.threads=1"]
    return ran(*argv, code=code)


def test_failing_point_stops_no_other_and_only_missing_points_run_again(tmp_path: Path, small: list[str]) -> None:
    settings = [*small, "steps=3", "optimizer.max_nonfinite_steps=1", "launcher.parallel_jobs=2"]
    done = sweep(tmp_path, *settings, "optimizer.lr=1e30,1e-3", code=1)
    assert done.stderr.count("no finite gradient") == 1, "reported once"
    assert done.stderr.endswith("1 of 2 points did not finish: optimizer.lr=1e+30\n")
    states = {path.name: read_status(path)["state"] for path in tmp_path.glob("optimizer*")}
    assert states == {"optimizer.lr=1e+30": "failed", "optimizer.lr=0.001": "finished"}
    assert "[optimizer.lr=0.001] step 3/3" in done.stdout and "1e+30" in done.stdout.split("bits/byte")[-1]
    stamp = (tmp_path / "optimizer.lr=0.001" / "metrics.jsonl").stat().st_mtime_ns

    assert sweep(tmp_path, *settings, "optimizer.lr=1e-3,3e-3").stdout.count("finished already: ") == 1
    assert read_status(tmp_path / "optimizer.lr=0.003")["state"] == "finished"
    assert (tmp_path / "optimizer.lr=0.001" / "metrics.jsonl").stat().st_mtime_ns == stamp
    losses = [float(line.split()[1]) for line in (tmp_path / "compare" / "table.md").read_text().splitlines()[2:4]]
    assert losses == sorted(losses), "the best is first"


def test_hopeless_point_ends_early(tmp_path: Path, small: list[str]) -> None:
    rule = ["early_stop.margin=0.2", "early_stop.after_step=5", "early_stop.every=1", "steps=30"]
    done = sweep(tmp_path, *small, *rule, "optimizer.lr=1e-2,1e-9")
    status = read_status(tmp_path / "optimizer.lr=1e-09")
    assert status["state"] == "given up" and "given up at step " in done.stdout
    assert "\ngiven up: optimizer.lr=1e-09\n" in done.stdout and "\nfinished: optimizer.lr=0.01, " in done.stdout
    step = json.loads((tmp_path / "optimizer.lr=1e-09" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert 5 <= step < 30
    again = sweep(tmp_path, *small, *rule, "optimizer.lr=1e-2,1e-9").stdout
    assert again.count("finished already: ") == 1 and again.count("given up already: ") == 1


def test_interrupted_sweep_saves_its_points_and_leaves_no_process(tmp_path: Path, small: list[str]) -> None:
    argv = [sys.executable, "train.py", "-m", *small, "steps=100000", "optimizer.lr=1e-3,1e-2"]
    settings = ["launcher.parallel_jobs=2", f"hydra.sweep.dir={tmp_path}", "parallel.threads=1", "logger.every=5"]
    process = subprocess.Popen([*argv, *settings], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while sum(path.stat().st_size > 0 for path in tmp_path.glob("optimizer*/metrics.jsonl")) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in printed
    points = list(tmp_path.glob("optimizer*"))
    assert [read_status(path)["state"] for path in points] == ["stopped"] * 2
    assert all(list(path.glob("checkpoints/step-*")) for path in points)
    assert not subprocess.run(["pgrep", "--full", str(tmp_path)], capture_output=True, text=True).stdout


def test_search_minimises_the_loss_continues_and_refuses_another(tmp_path: Path, small: list[str]) -> None:
    pytest.importorskip("optuna")
    search, space = ["hydra/sweeper=optuna", "steps=2"], "optimizer.lr=tag(log, interval(1e-4, 1e-2))"
    assert "has nothing to vary" in sweep(tmp_path, *small, *search, "optimizer.lr=1e-3", code=1).stderr
    for trials in (1, 2):
        done = sweep(tmp_path, *small, *search, space, f"hydra.sweeper.n_trials={trials}", "hydra.sweeper.n_jobs=2")
        assert done.stdout.count("finished: ") == 1 and f"best of {trials} trials: " in done.stdout
    losses = [read_status(path)["objective"] for path in tmp_path.glob("optimizer*")]
    assert len(losses) == 2 and f"{min(losses):.4f} at optimizer.lr=" in done.stdout
    others = {"distribution": ["optimizer.lr=1e-3,1e-1"], "seed (0, now 3)": [space, "seed=3"]}
    others["objective (valid/loss, now -valid/loss)"] = [space, "objective=-valid/loss"]
    for reported, other in others.items():
        done = sweep(tmp_path, *small, *search, "hydra.sweeper.n_trials=3", *other, code=1)
        assert "has a search with other settings" in done.stderr and reported in done.stderr


def test_search_minimises_the_score_of_a_task(tmp_path: Path, small: list[str]) -> None:
    pytest.importorskip("optuna")
    objective, space = "evaluation/builtin/bpb", "optimizer.lr=tag(log, interval(1e-6, 1e-2))"
    scored = ["steps=2", "evaluate.tasks=[builtin]", f"objective={objective}"]
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2", space]
    done = sweep(tmp_path, *(option for option in small if option != "optimizer.lr=1e-3"), *scored, *search)
    found = {metrics(path)[-1][objective]: path for path in tmp_path.glob("optimizer*")}
    assert len(found) == 2 and all(read_status(path)["objective"] == value for value, path in found.items())
    assert f"best of 2 trials: {min(found):.4f} at {found[min(found)].name}\n" in done.stdout


def test_sweep_of_mixtures_draws_the_loss_of_each_source(tmp_path: Path, small: list[str]) -> None:
    mixtures = ["~data.mix.en", "+data.mix.prose=1", "data.mix.code=0,3", "steps=2"]
    done = sweep(tmp_path, "experiment=mix_sweep", *small, *mixtures)
    assert "table.md, loss.png, final.png, mix.png\n" in done.stdout
    found = [metrics(path)[-1] for path in tmp_path.glob("*data.mix.code=*")]
    assert len(found) == 2, "values on the command line replace those of the experiment"
    assert all({"valid/loss/code", "valid/loss/prose"} < last.keys() for last in found)
    assert (tmp_path / "compare" / "table.md").read_text().split()[1] == "code"


def test_pruned_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    values = iter([2.0, math.inf, math.inf])

    def launch(points: list[Any], **_: int) -> list[Any]:
        return [SimpleNamespace(status=JobStatus.COMPLETED, return_value=next(values)) for _ in points]

    monkeypatch.setattr(OptunaSweeper, "_changed_settings", lambda *_: [])
    for n_trials in (2, 3, 3):
        search = OptunaSweeper(n_trials, 1, 0, OmegaConf.create())
        search.folder, search.config = tmp_path, OmegaConf.create()
        search.jobs = SimpleNamespace(launch=launch)  # type: ignore[assignment]
        search.sweep(["optimizer.lr=interval(1e-4, 1e-2)"])
    assert next(values, None) is None and capsys.readouterr().out.count("best of 1 trials: 2.0000 at ") == 3


def test_jobs_run_the_code_as_it_was_at_submission(tmp_path: Path) -> None:
    copy = keep_code(tmp_path)
    assert keep_code(tmp_path) == copy and (copy / "train.py").read_text() == (ROOT / "train.py").read_text()
    variables: Any = {"PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1"}
    printed = ran("-c", "import conf.schema, train; print(train.__file__)", **variables).stdout
    assert printed.strip() == str(copy / "train.py")


def test_killed_run_with_workers_releases_its_folder(tmp_path: Path, small: list[str]) -> None:
    settings = [*small, "steps=100000", "data.workers=2", "logger.every=1", f"hydra.run.dir={tmp_path}"]
    argv = [sys.executable, "train.py", *settings]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and any("step  " in line for line in process.stdout)
        assert is_held(tmp_path)
        process.kill()
    time.sleep(1)  # torch's own workers look for their parent every five seconds
    assert not is_held(tmp_path)


def test_interrupted_points_are_stopped(tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    queued = []

    def interrupt(points: list[Point], _folder: Path, _code: Path, begin: Any, _report: Any) -> None:
        for point in points:
            begin(point)
            queued.append(read_status(point.job.run_dir)["state"])
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.jobs.run_jobs", interrupt)
    interrupted = points(tmp_path, *small)
    with pytest.raises(KeyboardInterrupt):
        run_points(interrupted, tmp_path)
    assert queued == ["queued"] * 2
    assert [read_status(point.job.run_dir)["state"] for point in interrupted] == ["stopped"] * 2


def test_a_failure_is_shown_without_secrets(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(points: list[Point], _folder: Path, _code: Path, begin: Any, report: Any) -> None:
        for point in points:
            begin(point)
            report(point, Outcome("failed", reason="https://me:hunter2@x"))

    monkeypatch.setattr("launch.jobs.run_jobs", fail)
    run_points(points(tmp_path, *small), tmp_path)
    assert "hunter2" not in (shown := "".join(capsys.readouterr())) and shown.count("failed: https://me:***@x") == 2


def test_jobs_at_one_time_share_the_cores(tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    for options, threads in (
        (["launcher.parallel_jobs=3"], 4),
        (["launcher.parallel_jobs=null", "parallel=ddp", "parallel.nproc_per_node=2"], 3),
        ([], 12),
        (["launcher=slurm"], None),
    ):
        config = points(tmp_path, *small, *options)[0].job.args[0]
        shared = share_cores(config, 2)
        assert isinstance(config, TrainConfig) and isinstance(shared, TrainConfig)
        assert shared.parallel.threads == threads and config.parallel.threads is None


def test_dry_run_is_done_at_every_point_and_starts_no_job(tmp_path: Path, small: list[str]) -> None:
    line = ["launcher=slurm", "launcher.nodes=2", "parallel.dp_replicate=2", "dry_run.world_size=2"]
    done = sweep(tmp_path, *small, *line, "dry_run=true", "optimizer.lr=1e-3,1e-2")
    headings = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    assert headings == ["== optimizer.lr=0.001", "== optimizer.lr=0.01"]
    assert "dry_run" in sweep(tmp_path, *small, "dry_run.enabled=true,false", code=1).stderr
    assert not list(tmp_path.glob("*/status.json"))


def test_queued_job_is_followed_and_not_submitted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"7": "PENDING"}
    monkeypatch.setattr(slurm, "states", lambda ids: {job_id: states[job_id] for job_id in ids})
    assert slurm.queued_job(tmp_path, {"a": 1}) is None
    slurm.remember_job(tmp_path, "7", {"a": 1})
    assert slurm.queued_job(tmp_path, {"a": 1}) == "7"
    with pytest.raises(ParallelError, match="job 7, in the queue with another configuration"):
        slurm.queued_job(tmp_path, {"a": 2})
    states["7"] = "NODE_FAIL"
    assert slurm.queued_job(tmp_path, {"a": 2}) is None
