"""Jobs of a sweep, run on this machine or submitted to Slurm through submitit.

A job has a composed and checked configuration, and imports a snapshot of the code.
"""

import ctypes
import logging
import math
import os
import pickle
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from submitit import JobEnvironment
from submitit.core.utils import DelayedSubmission, JobPaths

from conf.schema import TrainConfig
from launch import slurm
from launch.config import LauncherConfig, Where
from launch.environment import visible_gpus
from launch.ranks import RankEnd, describe_failure, first_failure, handle, launch, read_ends
from parallel.config import ParallelConfig, ParallelError
from tracking.alerts import alerts
from tracking.logs import log_to, without_secrets
from tracking.status import crashed_the_same_way_twice

STOP_S = 60.0  # for local jobs to save when they are stopped

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """The pickled work of a job; `work` names a function, `module:function`."""

    work: str
    args: tuple
    run_dir: Path
    config: ParallelConfig
    launcher: LauncherConfig

    def __call__(self, paths: JobPaths | None = None) -> Any:
        """Run the work on this job's ranks and write its outcome; exit with 1 on failure, so that Slurm sees it."""
        end_file = _end_file(paths or JobEnvironment().paths)
        end_file.unlink(missing_ok=True)  # of an earlier attempt
        end = RankEnd.of(lambda: launch(pkgutil.resolve_name(self.work), *self.args, config=self.config))
        refused = ""
        if requeues := end.is_crash and self.launcher.requeue_crashes and self.launcher.where is Where.slurm:
            again = "it crashed twice at the same step" if crashed_the_same_way_twice(self.run_dir) else ""
            refused = again or slurm.requeue(self.launcher.max_requeues)
            end.text += f"\nnot requeued: {refused}" if refused else ""
        end.write(end_file)
        if requeues and self.args and isinstance(config := self.args[0], TrainConfig):
            with suppress(Exception), log_to(self.run_dir), alerts(config.alerts, self.run_dir):
                slurm.note_requeue(self.run_dir, refused)
        if end.exit_code is not None:
            sys.exit(end.exit_code)
        if end.text:
            print(without_secrets(end.text), file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)  # submitit would catch an exception and exit with 0
        return end.value

    def checkpoint(self) -> DelayedSubmission:
        """Return this job for submitit to requeue, if a signal arrives before there is anything to save."""
        return DelayedSubmission(self)


@dataclass
class Outcome:
    """The outcome of a point: `finished` with a value, `failed` or `stopped` with a reason."""

    state: str
    value: Any = None
    reason: str = ""


@dataclass
class Point:
    """One point of a sweep, its job and the job's state."""

    label: str
    job: Job
    described: dict[str, Any]  # configuration, which identifies the job in the queue
    check: Callable[[], object] = lambda: None  # raises a user error if it cannot start
    folder: Path = Path()  # for logs and results
    job_id: str = ""
    process: subprocess.Popen | None = None  # of a local job
    gpus: list[int] = field(default_factory=list)
    state: str = ""  # in Slurm
    shown: int = 0  # bytes of rank 0's output printed so far
    end: Outcome | None = None

    @property
    def name(self) -> str:
        return self.label or str(self.job.run_dir)

    def paths(self, rank: int = 0) -> JobPaths:
        return JobPaths(self.folder, job_id=self.job_id, task_id=rank)

    def show(self) -> None:
        """Print new lines of rank 0's output."""
        if not self.paths().stdout.exists():
            return
        with self.paths().stdout.open("rb") as file:
            file.seek(self.shown)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.shown += len(whole)
        prefix = f"[{self.label}] " if self.label else ""
        for line in whole.decode(errors="replace").splitlines():
            if not line.startswith("submitit "):
                with suppress(OSError):  # the terminal is closed
                    print(f"{prefix}{line}", flush=True)

    def is_over(self, states: Mapping[str, str]) -> bool:
        """Return whether the job has ended; `states` are Slurm's, or {} if it was not queried."""
        if self.process is not None:
            return self.process.poll() is not None
        before, self.state = self.state, states.get(self.job_id, self.state)
        if self.state != before:
            logger.info("job %s is %s: %s", self.job_id, self.state, self.name)
        return bool(states) and self.state in slurm.OVER and before in slurm.OVER  # twice: its files may appear late

    def read_end(self, over: bool) -> Outcome | None:
        """Return the outcome of the job, or None if it is still running; `over` means that it is not."""
        launcher = self.job.launcher
        n_ranks = launcher.nodes * launcher.ranks_per_node if self.process is None else 1
        ends = read_ends({rank: _end_file(self.paths(rank)) for rank in range(n_ranks)})
        first = first_failure(ends)
        if 0 in ends and first is None and ends[0].exit_code is None:
            return Outcome("finished", ends[0].value)
        if not over:
            return None
        if first is not None:
            text = describe_failure(first, ends[first].text) if n_ranks > 1 else ends[first].text
            return Outcome("failed", reason=text.removeprefix("error: ").rstrip())
        if ends or self.state == "CANCELLED":
            return Outcome("stopped", reason="stopped; the same command resumes it from its last checkpoint")
        state = f" ({self.state})" if self.state else ""
        return Outcome("failed", reason=f"no result{state}: killed, or out of memory; see {self.folder}")


def run_jobs(
    points: Sequence[Point],
    folder: Path,
    code: Path,
    begin: Callable[[Point], None] = lambda _: None,
    report: Callable[[Point, Outcome], None] = lambda *_: None,
) -> None:
    """Run a job for every point and report its outcome; a failure does not stop the others.

    `folder` is for logs and results, `code` is the snapshot of the code that jobs import. `begin` is called with
    every point after all checks, which raise `ParallelError`, and after Slurm jobs are submitted. An interrupt stops
    the jobs, which save; if the terminal closes, Slurm jobs keep running.
    """
    # Import from the snapshot, then from the user's PYTHONPATH, not from the current folder.
    folders = filter(None, (str(code.resolve()), os.environ.get("PYTHONPATH")))
    variables = {"PYTHONPATH": os.pathsep.join(folders), "PYTHONSAFEPATH": "1"}
    queue = [point for point in points if point.job.launcher.where is Where.local]
    to_submit = sorted((point for point in points if point.job.launcher.where is Where.slurm), key=_settings)
    running: list[Point] = []
    before = handle((signal.SIGTERM, signal.SIGHUP), lambda signum, _: sys.exit(128 + signum))
    try:
        for number, point in enumerate(queue):
            free_gpus(point, [])
            point.job_id = f"{os.getpid()}-{number}"
        for point in to_submit:
            point.job_id = slurm.queued_job(point.job.run_dir, point.described) or ""
            if point.job_id:
                running.append(point)
                logger.info("job %s is already in the queue: %s", point.job_id, point.name)
        for point in points:
            point.folder = folder
        for point in (*queue, *running):
            begin(point)
        for _, group in groupby((point for point in to_submit if not point.job_id), _settings):
            _submit(list(group), running, variables, begin)
        queried = -math.inf
        while queue or running:
            while queue and (gpus := free_gpus(queue[0], running)) is not None:
                _start(queue[0], gpus, variables)
                running.append(queue.pop(0))
            poll_s = min((point.job.launcher.poll_s for point in running), default=0)
            states = slurm.states(_slurm_ids(running)) if time.monotonic() - queried >= poll_s else {}
            queried = time.monotonic() if states else queried
            for point in list(running):
                over = point.is_over(states)
                point.show()
                if over or point.process is None:
                    point.end = point.read_end(over)
                if point.end is not None:
                    running.remove(point)
                    report(point, point.end)
            time.sleep(0.1)
    except BaseException as error:
        hung_up = isinstance(error, SystemExit) and error.code == 128 + signal.SIGHUP
        _stop(running, cancel=not hung_up)
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _settings(point: Point) -> str:
    return repr(point.job.launcher)


def _slurm_ids(points: Sequence[Point]) -> list[str]:
    return [point.job_id for point in points if point.process is None]


def free_gpus(point: Point, running: Sequence[Point]) -> list[int] | None:
    """Return the GPUs for a new local job, or None until some are free; raise `ParallelError` if there are too few."""
    launcher, n_gpus = point.job.launcher, visible_gpus()
    if (launcher.gpus_per_node or 0) > n_gpus:
        asked = f"launcher.gpus_per_node ({launcher.gpus_per_node})"
        raise ParallelError(f"{asked} must be at most the number of GPUs here ({n_gpus})")
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    ours = list(map(int, names)) if all(name.isdigit() for name in names) else list(range(n_gpus))
    here = [other for other in running if other.process is not None]
    free = [gpu for gpu in ours[:n_gpus] if not any(gpu in other.gpus for other in here)]
    wanted = launcher.gpus_per_job(n_gpus)
    if len(free) < wanted or len(here) >= (launcher.parallel_jobs or math.inf):
        return None
    return free[:wanted]


def _start(point: Point, gpus: list[int], variables: dict[str, str]) -> None:
    point.gpus, paths = gpus, point.paths()
    paths.folder.mkdir(parents=True, exist_ok=True)
    _end_file(paths).unlink(missing_ok=True)  # of an earlier job with this id
    paths.submitted_pickle.write_bytes(pickle.dumps((os.getpid(), point.job)))
    environment = {**os.environ, **variables, "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
    command = [sys.executable, "-u", "-m", "launch.jobs", str(point.folder), point.job_id]
    with paths.stdout.open("w", encoding="utf-8") as out, paths.stderr.open("w", encoding="utf-8") as errors:
        point.process = subprocess.Popen(command, env=environment, stdout=out, stderr=errors, process_group=0)


def _submit(
    points: list[Point], running: list[Point], variables: dict[str, str], begin: Callable[[Point], None]
) -> None:
    """Submit points with equal settings as one job array."""
    ids = slurm.submit([point.job for point in points], points[0].job.launcher, points[0].folder, variables)
    for point, point.job_id in zip(points, ids, strict=True):
        running.append(point)  # an interrupt now cancels it
    for point in points:
        slurm.remember_job(point.job.run_dir, point.job_id, point.described)
        begin(point)
        logger.info("job %s is submitted: %s", point.job_id, point.name)


def _stop(running: Sequence[Point], *, cancel: bool) -> None:
    """Stop local jobs and wait until they have saved; a second interrupt kills them. `cancel`: cancel Slurm jobs."""
    if cancel and (ids := _slurm_ids(running)):
        slurm.ask("scancel", *ids)
        with suppress(OSError):
            print(f"\ncancelled {', '.join(ids)}; the same command resumes their runs", file=sys.stderr)
    processes = [point.process for point in running if point.process is not None]
    deadline = time.monotonic() + STOP_S
    try:
        for process in processes:
            process.terminate()
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.2)
            for point in running:
                point.show()
    finally:
        for process in processes:
            process.kill()


def _end_file(paths: JobPaths) -> Path:
    return paths.folder / f"{paths.job_id}_{paths.task_id}_end"


def _main(folder: str, job_id: str) -> None:
    """Run a local job, which saves and stops when its client dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    paths = JobPaths(folder, job_id=job_id, task_id=0)
    client, job = pickle.loads(paths.submitted_pickle.read_bytes())
    if os.getppid() == client:
        job(paths)


if __name__ == "__main__":
    _main(*sys.argv[1:])
