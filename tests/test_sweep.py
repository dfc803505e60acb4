"""Sweeps on this machine: all points or none, each a job, nothing twice, and what came out told."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conf.sweep import keep_code
from parallel import slurm
from parallel.config import ParallelError
from tests.conftest import ROOT, trained
from training.compare import Run, as_markdown, compare, draw, read_runs, swept_keys, table
from training.config import CheckpointError, EarlyStopConfig
from training.early_stop import is_hopeless
from training.status import Status, crashed_the_same_way_twice, read_status

pytestmark = pytest.mark.slow

BLOCK = 32768  # bytes, of LevelDB's log format


def sweep(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    argv = [
        sys.executable,
        "train.py",
        "-m",
        *overrides,
        "name=sweep",
        f"hydra.sweep.dir={folder}",
        "parallel.threads=1",
    ]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)


def test_a_failing_point_does_not_stop_the_others_and_only_what_is_missing_runs_again(
    tmp_path: Path, small: list[str]
) -> None:
    settings = [*small, "steps=3", "optimizer.max_bad_steps=1", "launcher.parallel_jobs=2"]
    done = sweep(tmp_path, *settings, "optimizer.lr=1e30,1e-3,1e-2")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("no finite gradient") == 1, "told once"
    assert done.stderr.endswith("error: 1 of 3 points did not finish: optimizer.lr=1e+30\n")
    states = {path.name: read_status(path)["state"] for path in tmp_path.glob("optimizer*")}
    assert states == {
        "optimizer.lr=1e+30": "failed", "optimizer.lr=0.001": "finished", "optimizer.lr=0.01": "finished"
    }  # fmt: skip
    assert "[optimizer.lr=0.001] step 3/3" in done.stdout and "1e+30" in done.stdout.split("bits/byte")[-1]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")}

    done = sweep(tmp_path, *settings, "optimizer.lr=1e-3,1e-2,3e-3")
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("finished already: ") == 2
        and read_status(tmp_path / "optimizer.lr=0.003")["state"] == "finished"
    )
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    losses = [float(line.split()[1]) for line in (tmp_path / "compare" / "table.txt").read_text().splitlines()[1:4]]
    assert losses == sorted(losses), "the best is first"


def test_no_point_is_started_if_the_data_of_one_are_not_there(tmp_path: Path, small: list[str]) -> None:
    kept = [o for o in small if not o.startswith("data.path=")]
    corpus = next(o for o in small if o.startswith("data.path="))
    done = sweep(tmp_path, *kept, f"{corpus},nowhere", "hydra.sweep.subdir=${hydra.job.num}")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line == (
        "error: there is no prepared data in nowhere; run: python prepare_data.py with the same data settings "
        "(at data.path=nowhere)"
    )
    assert not [path for path in tmp_path.iterdir() if path.name != "multirun.yaml"]


def test_the_points_of_a_sweep_stand_side_by_side_in_tensorboard_and_in_one_group_in_wandb(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = sweep(tmp_path, *small, "logger=wandb", "steps=1", "launcher.parallel_jobs=2", "optimizer.lr=1e-3,1e-2")
    assert done.returncode == 0, done.stderr
    points = {"optimizer.lr=0.001", "optimizer.lr=0.01"}
    assert {path.parts[-3] for path in tmp_path.glob("*/tensorboard/events*")} == points
    runs = [run for path in tmp_path.glob("*/wandb/*/*.wandb") for run in wandb_runs(path)]
    assert {run.display_name for run in runs} == points
    assert {run.run_group for run in runs} == {"sweep"}


def wandb_runs(path: Path) -> list[Any]:
    """Read the runs in what wandb wrote offline: records in LevelDB's log format, after a head of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    data, at, parts, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(parts))
            parts = b""
    return [record.run for record in records if record.HasField("run")]


def test_an_interrupted_sweep_saves_its_points_and_leaves_no_process(tmp_path: Path, small: list[str]) -> None:
    argv = [
        sys.executable,
        "train.py",
        "-m",
        *small,
        "steps=100000",
        "optimizer.lr=1e-3,1e-2",
        "launcher.parallel_jobs=2",
    ]
    settings = [f"hydra.sweep.dir={tmp_path}", "parallel.threads=1", "logger.every=5"]
    process = subprocess.Popen([*argv, *settings], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while sum(path.stat().st_size > 0 for path in tmp_path.glob("optimizer*/metrics.jsonl")) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in told
    points = list(tmp_path.glob("optimizer*"))
    assert [read_status(path)["state"] for path in points] == ["stopped"] * 2
    assert all(list(path.glob("checkpoints/step-*")) for path in points)
    assert not subprocess.run(["pgrep", "--full", str(tmp_path)], capture_output=True, text=True).stdout


def test_a_search_minimises_the_loss_and_goes_on_where_it_was(tmp_path: Path, small: list[str]) -> None:
    pytest.importorskip("optuna")
    space = [
        "hydra/sweeper=optuna",
        "optimizer.lr=tag(log, interval(1e-4, 1e-2))",
        "steps=2",
        "launcher.parallel_jobs=2",
    ]
    for trials, new in ((2, 2), (3, 1)):
        done = sweep(tmp_path, *small, *space, f"hydra.sweeper.n_trials={trials}", "hydra.sweeper.n_jobs=2")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("finished: ") == new and f"best of {trials} trials: " in done.stdout
    losses = [read_status(path)["valid_loss"] for path in tmp_path.glob("optimizer*")]
    assert len(losses) == 3 and f"{min(losses):.4f} at optimizer.lr=" in done.stdout


def test_jobs_run_the_code_as_it_was_when_they_were_asked_for(tmp_path: Path) -> None:
    copy = keep_code(tmp_path)
    assert keep_code(tmp_path) == copy and (copy / "train.py").read_text() == (ROOT / "train.py").read_text()
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", "import conf.schema, train; print(train.__file__)"]
    told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert told.strip() == str(copy / "train.py")


def written(folder: Path, losses: list[float | None], **config: object) -> Path:
    """A run folder with these training losses, of 100 tokens a step."""
    folder.mkdir(parents=True)
    with Status(folder, {"name": "s", "steps": 1, **config}) as status:
        records = [{"step": i, "tokens": 100 * i, "train/loss": loss} for i, loss in enumerate(losses, 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        status.end(losses[-1], stopped=False, given_up=False)
    return folder


def test_a_point_is_given_up_when_it_is_behind_the_best_at_the_same_tokens(tmp_path: Path) -> None:
    best = written(tmp_path / "best", [5.0, 4.0, 3.0, 2.0, 1.0])
    rule = EarlyStopConfig(margin=0.5, after_step=2, every=1)
    same = written(tmp_path / "same", [5.0, 4.0])
    assert not is_hopeless(rule, same, 2), "behind the best's end, not behind it at the same tokens"
    worse = written(tmp_path / "worse", [6.0, 5.5])
    assert is_hopeless(rule, worse, 2) and not is_hopeless(rule, best, 5)
    assert not is_hopeless(rule, worse, 1) and not is_hopeless(EarlyStopConfig(), worse, 2)
    assert is_hopeless(rule, written(tmp_path / "nan", [5.0, None]), 2)
    assert not is_hopeless(rule, written(tmp_path / "ahead", [9.0] * 9), 9), "nobody has come so far"


def test_a_hopeless_point_ends_early_and_is_not_run_again(tmp_path: Path, small: list[str]) -> None:
    rule = ["early_stop.margin=0.2", "early_stop.after_step=5", "early_stop.every=1", "steps=30"]
    done = sweep(tmp_path, *small, *rule, "optimizer.lr=1e-2,1e-9")
    assert done.returncode == 0, done.stderr
    status = read_status(tmp_path / "optimizer.lr=1e-09")
    assert status["state"] == "given up" and "given up at step " in done.stdout
    step = json.loads((tmp_path / "optimizer.lr=1e-09" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert 5 <= step < 30
    assert sweep(tmp_path, *small, *rule, "optimizer.lr=1e-2,1e-9").stdout.count("finished already: ") == 2


def test_a_comparison_shows_what_differs_the_best_first_whatever_the_state(tmp_path: Path) -> None:
    for rate, losses in {1e-4: [5.0, 4.0], 3e-3: [5.0, 3.0], 1e-2: [5.0, None]}.items():
        written(tmp_path / f"lr={rate}", losses, optimizer={"lr": rate, "beta1": 0.9}, logger={"every": rate})
    crashed = written(tmp_path / "lr=1", [5.0], optimizer={"lr": 1.0, "beta1": 0.9})
    with pytest.raises(ValueError, match="boom"), Status(crashed, read_status(crashed)["config"]):
        with (crashed / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "tokens": 200}\n')
        raise ValueError("boom\nand more")
    running = written(tmp_path / "lr=0.1", [5.0], optimizer={"lr": 0.1, "beta1": 0.9})
    with Status(running, read_status(running)["config"]), (running / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "tok')  # being written
        told = compare(tmp_path)
    assert swept_keys(read_runs(tmp_path)) == ["optimizer.lr"]
    rows = [line.split() for line in told.splitlines()]
    assert rows[0] == ["lr", "loss", "bits/byte", "tok/s/gpu", "tokens", "step", "state"]
    assert rows[1][0] == "0.003" and rows[2][0] == "0.0001" and rows[1][-1] == "finished"
    assert {(row[0], row[-1]) for row in rows[3:]} == {("0.01", "finished"), ("1", "failed"), ("0.1", "failed")}
    assert "lr=1: ValueError: boom" in (tmp_path / "compare" / "table.txt").read_text()
    markdown = (tmp_path / "compare" / "table.md").read_text()
    assert "| 0.003 | " in markdown and "![final loss](final.png)" in markdown
    assert (tmp_path / "compare" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(CheckpointError, match="there is no run in"):
        read_runs(tmp_path / "compare")


def test_a_run_that_a_process_holds_is_running(tmp_path: Path, small: list[str]) -> None:
    from training.run_folder import locked

    trained(tmp_path / "r", *small, "steps=1")
    with locked(tmp_path / "r"), Status(tmp_path / "r", {"steps": 1}):
        assert read_runs(tmp_path)[0].state == "running"


def test_a_run_that_is_refused_stays_what_it_was(tmp_path: Path) -> None:
    written(tmp_path / "r", [1.0], seed=1)
    before = read_status(tmp_path / "r")
    with pytest.raises(CheckpointError), Status(tmp_path / "r", {"name": "s", "steps": 1, "seed": 2}):
        raise CheckpointError("begun with another configuration")
    assert {**read_status(tmp_path / "r"), "time": 0} == {**before, "time": 0} and before["state"] == "finished"


def test_a_line_that_was_cut_short_does_not_hide_how_a_run_went(tmp_path: Path) -> None:
    written(tmp_path / "r", [2.0, 1.0], seed=1)
    with (tmp_path / "r" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/lo')
    with pytest.raises(OSError, match="full"), Status(tmp_path / "r", {"steps": 5}):
        raise OSError("the disk is full")
    crash = json.loads((tmp_path / "r" / "crashes.jsonl").read_text())
    assert crash["step"] == 2 and "the disk is full" in crash["error"]


def test_final_losses_stand_over_a_rate_on_a_logarithmic_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scales = []
    runs = [
        Run(str(v), "finished", {"a": v, "b": f"x{v}", "steps": 1}, [(1, 1.0)], [], 1, None, None, "")
        for v in (0.1, 1.0)
    ]
    monkeypatch.setattr(
        "training.compare._save", lambda figure, _: scales.extend(axes.get_xscale() for axes in figure.axes)
    )
    draw(runs, ["a", "b"], tmp_path)
    assert scales == ["linear", "log", "linear"], "tokens, a factor of ten, words"
    assert as_markdown(*table(runs, ["b"])).splitlines()[2].startswith("| x0.1 | 1.0000 | - | - | 1 | 1/1 | finished |")


def test_the_same_crash_at_the_same_step_twice_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(attempt: int, error: Exception, rank: int = 0) -> None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(attempt))
        with pytest.raises(type(error)), Status(tmp_path, {}, rank=rank):
            raise error

    crash(0, ValueError("boom"), rank=1)
    crash(0, RuntimeError("connection closed by peer"))
    assert not crashed_the_same_way_twice(tmp_path), "two ranks in one attempt"
    crash(1, RuntimeError("another"))
    assert not crashed_the_same_way_twice(tmp_path)
    crash(2, RuntimeError("another"))
    assert crashed_the_same_way_twice(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n')
    crash(3, RuntimeError("another"))
    assert not crashed_the_same_way_twice(tmp_path), "it came further"


def test_a_job_in_the_queue_is_followed_and_not_doubled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"7": "PENDING"}
    monkeypatch.setattr(slurm, "states", lambda ids: {job_id: states[job_id] for job_id in ids})
    assert slurm.queued_job(tmp_path, {"a": 1}) is None
    slurm.remember_job(tmp_path, "7", {"a": 1})
    assert slurm.queued_job(tmp_path, {"a": 1}) == "7"
    with pytest.raises(ParallelError, match=r"is that of job 7, which is in the queue with another configuration"):
        slurm.queued_job(tmp_path, {"a": 2})
    states["7"] = "NODE_FAIL"
    assert slurm.queued_job(tmp_path, {"a": 2}) is None
