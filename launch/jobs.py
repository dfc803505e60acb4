"""Jobs of a sweep: submitted through submitit to this machine or to Slurm, followed, and told apart by how they ended.

A job is a configuration that was composed and checked before, and a copy of the code as it was then.
"""

import json
import logging
import os
import pkgutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from submitit.core.utils import DelayedSubmission, JobPaths, pickle_load
from submitit.local.local import LocalExecutor
from submitit.local.local import LocalJob as Controller

from launch import slurm
from launch.config import LauncherConfig, RankError, Where
from launch.ranks import having, launch, says_timeout, visible_gpus
from parallel.config import ParallelConfig, ParallelError

logger = logging.getLogger(__name__)

NO_LIMIT_MIN = 10 * 365 * 24 * 60
STACK = "(most recent call first)"  # heads what faulthandler writes
STOP_S = 60.0  # that jobs of this machine have to save when they are stopped


@dataclass
class Job:
    """What runs in a job, pickled. `work` is a function's name, `module:function`."""

    work: str
    args: tuple
    config: ParallelConfig
    is_user_error: Callable[[BaseException], bool]
    launcher: LauncherConfig
    hopeless: Callable[[], bool]  # whether a crash is one that would come again
    client: int | None = None  # the process with which a job of this machine ends

    def __call__(self) -> Any:
        """Run the work on this job's ranks; leave a record of how it failed, and Slurm a code that says so."""
        rank = int(os.environ.get("SLURM_PROCID", "0"))
        paths = _paths_here(rank)
        record = paths.folder / f"{paths.job_id}_{rank}_end.json"
        record.unlink(missing_ok=True)  # of before a requeue
        if self.client is not None:
            threading.Thread(target=_end_with, args=(self.client,), daemon=True).start()
        try:
            work = pkgutil.resolve_name(self.work)
            return launch(work, *self.args, config=self.config, is_user_error=self.is_user_error)
        except SystemExit as stop:
            _write(record, {"time": time.time(), "rank": rank, "stopped": stop.code})
            raise
        except Exception as error:
            told = self.is_user_error(error) or isinstance(error, RankError)
            text = str(error) if told else traceback.format_exc()
            if self.launcher.requeue_crashes and self.launcher.where is Where.slurm and not self.is_user_error(error):
                again = "it crashed twice at the same step" if self.hopeless() else ""
                refused = again or slurm.requeue(self.launcher.max_requeues)
                text += f"not requeued: {refused}\n" if refused else ""
            _write(record, {"time": time.time(), "rank": rank, "text": text})
            print(text, file=sys.stderr, flush=True)
            sys.stdout.flush()
            if self.launcher.where is Where.slurm and says_timeout(text):
                slurm.ask_for_stacks()
            os._exit(1)  # past submitit, to which an exception is a result

    def checkpoint(self) -> DelayedSubmission:
        """Have submitit requeue the same job if a signal comes before there is anything to save."""
        return DelayedSubmission(self)


def _paths_here(rank: int) -> JobPaths:
    from submitit import JobEnvironment

    return JobPaths(os.environ["SUBMITIT_FOLDER"], job_id=JobEnvironment().job_id, task_id=rank)


def _write(path: Path, record: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record))
    partial.replace(path)


def _end_with(client: int) -> None:
    """Ask this process to stop and save once the one that wanted it is gone."""
    while Path(f"/proc/{client}").exists():
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


@dataclass
class Point:
    """One point of a sweep: what is told of it, its folder, and what runs."""

    label: str
    run_dir: Path
    launcher: LauncherConfig
    described: dict[str, Any]  # its configuration, to know it again
    job: Job
    needed: list[tuple[Path, str]] = field(default_factory=list)  # that nodes must see: `slurm.check` says more


@dataclass
class Outcome:
    """How a point ended: `finished` with a value, `failed` or `stopped` with a reason."""

    state: str
    value: Any = None
    reason: str = ""


@dataclass
class Running:
    """A point whose job was submitted."""

    point: Point
    job_id: str
    folder: Path  # of submitit's files
    prefix: str  # of its lines on the screen
    controller: Controller | None = None
    gpus: list[int] = field(default_factory=list)
    state: str = ""
    shown: int = 0  # bytes of rank 0's output

    @property
    def paths(self) -> JobPaths:
        return JobPaths(self.folder, job_id=self.job_id, task_id=0)

    def show(self) -> None:
        """Print what rank 0 wrote since the last time, in whole lines."""
        if not self.paths.stdout.exists():
            return
        with self.paths.stdout.open("rb") as file:
            file.seek(self.shown)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.shown += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            if not line.startswith("submitit "):
                print(f"{self.prefix}{line}", flush=True)

    def outcome(self, ended: bool) -> Outcome | None:
        """Say how the job ended; None while it goes on. `ended`: nothing more will come of it."""
        if self.paths.result_pickle.exists():
            kind, value = pickle_load(self.paths.result_pickle)
            return Outcome("finished", value) if kind == "success" else Outcome("failed", reason=value)
        if not ended:
            return None
        found = [json.loads(p.read_text()) for p in self.paths.folder.glob(f"{self.job_id}_*_end.json")]
        failures = sorted((record for record in found if "text" in record), key=lambda record: record["time"])
        if failures:
            first = failures[0]
            of_rank = f"rank {first['rank']} failed first\n" if len(failures) > 1 or first["rank"] else ""
            reason = of_rank + first["text"].removeprefix("error: ").rstrip()
            return Outcome("failed", reason=reason + self._stacks(first["text"], {record["rank"] for record in found}))
        if found or self.state == "CANCELLED":
            return Outcome("stopped", reason="it was stopped; the same command goes on from its last checkpoint")
        state = f" ({self.state})" if self.state else ""
        return Outcome("failed", reason=f"it ended without a word{state}: killed, or out of memory; see {self.folder}")

    def _stacks(self, text: str, ended: set[int]) -> str:
        """Where the ranks stood that others waited for in vain."""
        config = self.point.launcher
        silent = [rank for rank in range(config.nodes * config.ranks_per_node) if rank not in ended]
        if not says_timeout(text) or config.where is Where.local:
            return ""
        logs = [(rank, JobPaths(self.folder, job_id=self.job_id, task_id=rank).stderr.read_text()) for rank in silent]
        stacks = [(rank, log[log.rfind("\n", 0, log.find(STACK)) + 1 :].rstrip()) for rank, log in logs if STACK in log]
        return "".join(f"\nrank {rank} hung; it stood at\n{stack}" for rank, stack in stacks)


def run_jobs(
    points: Sequence[Point],
    folder: Path,
    code: Path,
    report: Callable[[Point, Outcome], None],
    begin: Callable[[Point], None] = lambda _: None,
) -> None:
    """Run a job for every point and report each as it ends; no failure of one stops another.

    `folder` takes submitit's files and `code` is the copy of the code that jobs run. `begin` is called with every
    point once none was refused, which raises `ParallelError`. When this process is interrupted the jobs are stopped,
    which saves them.
    """
    running: list[Running] = []
    prefixed = len(points) > 1
    try:
        with _sigterm_interrupts():
            on_slurm = [point for point in points if point.launcher.where is Where.slurm]
            queue = [point for point in points if point.launcher.where is Where.local]
            for point in queue:
                free_gpus(point, [])
            in_queue, groups = _planned(on_slurm, folder)
            for point in points:
                begin(point)
            for point, job_id in in_queue:
                _follow(point, job_id, "in the queue already", running, folder, prefixed)
            for group in groups:
                _submit_to_slurm(group, running, folder, code, prefixed)
            asked_at = 0.0
            while queue or running:
                while queue and (begun := _start_here(queue[0], running, folder, code, prefixed)):
                    running.append(begun)
                    queue.pop(0)
                ask = time.monotonic() - asked_at >= min((r.point.launcher.poll_s for r in running), default=1.0)
                asked_at = time.monotonic() if ask else asked_at
                for job in _ended(running, ask):
                    job.show()
                    outcome = job.outcome(ended=True)
                    assert outcome is not None
                    running.remove(job)
                    report(job.point, outcome)
                time.sleep(0.1 if any(r.controller for r in running) else 0.5)
    except BaseException:
        _stop(running)
        raise


def _ended(running: list[Running], ask: bool) -> list[Running]:
    """Show what the jobs say and give those that are over, asking Slurm when `ask`."""
    on_slurm = [job for job in running if job.controller is None]
    states = slurm.states([job.job_id for job in on_slurm]) if ask and on_slurm else {}
    over = []
    for job in running:
        job.show()
        if job.controller is not None:
            ended = job.controller._process is None or job.controller._process.poll() is not None
        else:
            ended = ask and states[job.job_id] in slurm.OVER and job.state in slurm.OVER  # seen twice
            if ask and job.state != states[job.job_id]:
                job.state = states[job.job_id]
                logger.info("job %s is %s: %s", job.job_id, job.state, job.point.label or job.point.run_dir)
        if ended or job.outcome(ended=False) is not None:
            over.append(job)
    return over


def _start_here(point: Point, running: list[Running], folder: Path, code: Path, prefixed: bool) -> Running | None:
    """Start a point's job on this machine, if there is room beside those that run."""
    at_once = point.launcher.parallel_jobs
    here = [job for job in running if job.controller is not None]
    if at_once is not None and len(here) >= at_once:
        return None
    gpus = free_gpus(point, here)
    if gpus is None:
        return None
    executor = LocalExecutor(folder)
    executor.update_parameters(timeout_min=NO_LIMIT_MIN, gpus_per_node=len(gpus), visible_gpus=gpus)
    point.job.client = os.getpid()
    ours = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the job is told once, by us
    try:
        with having(_variables_of_jobs(code)):
            controller = executor.submit(point.job)
    finally:
        signal.signal(signal.SIGINT, ours)
    assert isinstance(controller, Controller)
    for path in (controller.paths.result_pickle, folder / f"{controller.job_id}_0_end.json"):
        path.unlink(missing_ok=True)  # of an earlier process that had this number
    prefix = f"[{point.label}] " if prefixed else ""
    return Running(point, controller.job_id, folder, prefix, controller, gpus)


def free_gpus(point: Point, here: list[Running]) -> list[int] | None:
    """Give the GPUs of a new job on this machine, or None if too few are free; raises `ParallelError` if there are not
    so many at all."""
    n_gpus = visible_gpus()
    asked = point.launcher.gpus_per_node or 0
    if asked > n_gpus:
        raise ParallelError(f"launcher.gpus_per_node ({asked}) must be at most the number of GPUs here ({n_gpus})")
    if not n_gpus:
        return []
    asked = point.launcher.gpus_of_a_job(n_gpus)
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    ours = [int(name) for name in named] if all(name.isdigit() for name in named) else list(range(n_gpus))
    free = [gpu for gpu in ours if not any(gpu in job.gpus for job in here)]
    return free[:asked] if len(free) >= asked else None


def _planned(points: list[Point], folder: Path) -> tuple[list[tuple[Point, str]], list[list[Point]]]:
    """Give the points whose job still is in the queue, each with it, and the others, those of equal settings together.

    Raises `ParallelError` if one of these cannot be submitted.
    """
    in_queue: list[tuple[Point, str]] = []
    groups: list[list[Point]] = []
    for point in points:
        job_id = slurm.queued_job(point.run_dir, point.described)
        alike = next((group for group in groups if group[0].launcher == point.launcher), None)
        if job_id is not None:
            in_queue.append((point, job_id))
        elif alike is None:
            groups.append([point])
        else:
            alike.append(point)
    for group in groups:
        slurm.check(group[0].launcher, folder, [need for point in group for need in point.needed])
    return in_queue, groups


def _submit_to_slurm(points: list[Point], running: list[Running], folder: Path, code: Path, prefixed: bool) -> None:
    """Submit points of equal settings as one array; each is among the `running` ones as soon as it has a job."""
    jobs, config = [point.job for point in points], points[0].launcher
    for point, job_id in zip(points, slurm.submit(jobs, config, folder, _variables_of_jobs(code)), strict=True):
        slurm.remember_job(point.run_dir, job_id, point.described)
        _follow(point, job_id, "submitted", running, folder, prefixed)


def _follow(point: Point, job_id: str, how: str, running: list[Running], folder: Path, prefixed: bool) -> None:
    running.append(Running(point, job_id, folder, f"[{point.label}] " if prefixed else ""))
    logger.info("job %s is %s: %s", job_id, how, point.label or point.run_dir)


def _variables_of_jobs(code: Path) -> dict[str, str]:
    """Have a job import the copy of the code, and nothing of the folder it runs in."""
    return {"PYTHONPATH": str(code.resolve()), "PYTHONSAFEPATH": "1"}


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    def interrupt(_signum: int, _frame: FrameType | None) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(running: list[Running]) -> None:
    """Stop jobs in a way that lets them save, and say so; a second interrupt kills those of this machine."""
    here = [job for job in running if job.controller is not None]
    there = [job.job_id for job in running if job.controller is None]
    if there:
        slurm.cancel(there)
        print(f"\ncancelled {', '.join(there)}; the same command goes on from their last checkpoints", file=sys.stderr)
    processes = [job.controller._process for job in here if job.controller and job.controller._process]
    try:
        until = time.monotonic() + STOP_S
        while any(process.poll() is None for process in processes) and time.monotonic() < until:
            for process in processes:
                process.send_signal(signal.SIGTERM)  # again, because one that is starting has no ear yet
            time.sleep(0.5)
            for job in here:
                job.show()
    finally:
        for process in processes:
            process.kill()
