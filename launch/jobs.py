"""Jobs of a sweep: run on this machine or submitted to Slurm through submitit, followed, and reported as they end.

A job holds a configuration that was composed and checked before, and imports a copy of the code as it was then.
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
from functools import partial
from itertools import count, groupby
from pathlib import Path
from typing import Any

from submitit import JobEnvironment
from submitit.core.utils import DelayedSubmission, JobPaths

from launch import slurm
from launch.config import LauncherConfig, Where
from launch.environment import visible_gpus
from launch.ranks import RankEnd, UserErrorTest, describe_failure, first_failure, handle, launch, read_ends
from parallel.config import ParallelConfig, ParallelError

STOP_S = 60.0  # for jobs of this machine to save when they are stopped

logger = logging.getLogger(__name__)


def end_file(paths: JobPaths) -> Path:
    return paths.folder / f"{paths.job_id}_{paths.task_id}_end"


@dataclass
class Job:
    """The work of a job, pickled. `work` is a function's name, `module:function`."""

    work: str
    args: tuple
    config: ParallelConfig
    is_user_error: UserErrorTest
    launcher: LauncherConfig
    hopeless: Callable[[], bool]  # whether the last crash repeats the one before

    def __call__(self, paths: JobPaths | None = None) -> Any:
        """Run the work on this job's ranks and write how it ended; a failure exits with 1, which Slurm acts on."""
        paths = paths or JobEnvironment().paths
        work, on_slurm = pkgutil.resolve_name(self.work), self.launcher.where is Where.slurm
        start = partial(launch, work, *self.args, config=self.config, is_user_error=self.is_user_error)
        end = RankEnd.of(start, end_file(paths), self.is_user_error)
        if end.is_crash and self.launcher.requeue_crashes and on_slurm:
            again = "it crashed twice at the same step" if self.hopeless() else ""
            refused = again or slurm.requeue(self.launcher.max_requeues)
            end.text += f"\nnot requeued: {refused}" if refused else ""
        end.write(end_file(paths))
        if end.exit_code is not None:
            sys.exit(end.exit_code)
        if end.text:
            print(end.text, file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)  # submitit would make an exception a result, and the job a success
        return end.value

    def checkpoint(self) -> DelayedSubmission:
        """Have submitit requeue the same job if a signal comes before there is anything to save."""
        return DelayedSubmission(self)


@dataclass
class Point:
    """One point of a sweep: its label, its folder, and its job."""

    label: str
    run_dir: Path
    launcher: LauncherConfig
    described: dict[str, Any]  # its configuration, which identifies its job in the queue
    job: Job
    needed: list[tuple[Path, str]] = field(default_factory=list)  # paths that nodes must see; see slurm.check

    @property
    def name(self) -> str:
        return self.label or str(self.run_dir)


@dataclass
class Outcome:
    """How a point ended: `finished` with a value, `failed` or `stopped` with a reason."""

    state: str
    value: Any = None
    reason: str = ""


Report = Callable[[Point, Outcome], None]


@dataclass
class Running:
    """A point whose job was started."""

    point: Point
    job_id: str
    folder: Path  # of logs and results
    process: subprocess.Popen | None = None  # on this machine
    gpus: list[int] = field(default_factory=list)
    state: str = ""  # in Slurm
    shown: int = 0  # bytes of rank 0's output

    def paths(self, rank: int = 0) -> JobPaths:
        return JobPaths(self.folder, job_id=self.job_id, task_id=rank)

    def show(self) -> None:
        """Print the lines that rank 0 has written since the last time."""
        if not self.paths().stdout.exists():
            return
        with self.paths().stdout.open("rb") as file:
            file.seek(self.shown)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.shown += len(whole)
        prefix = f"[{self.point.label}] " if self.point.label else ""
        for line in whole.decode(errors="replace").splitlines():
            if not line.startswith("submitit "):
                with suppress(OSError):  # the terminal is gone
                    print(f"{prefix}{line}", flush=True)

    def is_over(self, states: Mapping[str, str]) -> bool:
        """Return whether nothing more will come of the job; `states` are Slurm's, {} if it was not asked."""
        if self.process is not None:
            return self.process.poll() is not None
        before, self.state = self.state, states.get(self.job_id, self.state)
        if self.state != before:
            logger.info("job %s is %s: %s", self.job_id, self.state, self.point.name)
        return bool(states) and self.state in slurm.OVER and before in slurm.OVER  # twice: its files may come late

    def outcome(self, over: bool) -> Outcome | None:
        """Return how the job ended; None while it runs, unless it is known to be over."""
        config = self.point.launcher
        n_ranks = config.nodes * config.ranks_per_node if self.process is None else 1
        files = {rank: end_file(self.paths(rank)) for rank in range(n_ranks)}
        ends = read_ends(files)
        first = first_failure(ends)
        if 0 in ends and first is None and ends[0].exit_code is None:
            return Outcome("finished", ends[0].value)
        if not over:
            return None
        if first is not None:
            text = ends[first].text
            text = describe_failure(first, text) if n_ranks > 1 else text
            return Outcome("failed", reason=text.removeprefix("error: ").rstrip())
        if ends or self.state == "CANCELLED":
            return Outcome("stopped", reason="stopped; the same command resumes it from its last checkpoint")
        state = f" ({self.state})" if self.state else ""
        return Outcome("failed", reason=f"no result{state}: killed, or out of memory; see {self.folder}")


def run_jobs(
    points: Sequence[Point], folder: Path, code: Path, report: Report, begin: Callable[[Point], None] = lambda _: None
) -> None:
    """Run a job for every point and report each as it ends; a failed one does not stop the others.

    `folder` takes logs and results, `code` is the copy of the code that jobs import. `begin` is called with every
    point once all have passed the checks, which raise `ParallelError`. An interrupt stops the jobs, which save;
    when the terminal closes, those in Slurm go on.
    """
    jobs = _Jobs(folder, code)
    queue = [point for point in points if point.launcher.where is Where.local]
    to_submit = sorted((point for point in points if point.launcher.where is Where.slurm), key=_settings)
    before = handle((signal.SIGTERM, signal.SIGHUP), lambda signum, _: sys.exit(128 + signum))
    try:
        for point in queue:
            free_gpus(point, [])
        ids = {point.run_dir: slurm.queued_job(point.run_dir, point.described) for point in to_submit}
        new = [point for point in to_submit if not ids[point.run_dir]]
        arrays = [list(array) for _, array in groupby(new, _settings)]
        for array in arrays:
            slurm.check(array[0].launcher, folder, [need for point in array for need in point.needed])
        for point in points:
            begin(point)
        for point in to_submit:
            if job_id := ids[point.run_dir]:
                jobs.follow(point, job_id, "already in the queue")
        for array in arrays:
            jobs.submit(array)
        queried = -math.inf
        while queue or jobs.running:
            while queue and jobs.start(queue[0]):
                queue.pop(0)
            poll_s = min((job.point.launcher.poll_s for job in jobs.running), default=0)
            states = slurm.states(jobs.slurm_ids()) if time.monotonic() - queried >= poll_s else {}
            queried = time.monotonic() if states else queried
            for job in list(jobs.running):
                over = job.is_over(states)
                job.show()
                outcome = job.outcome(over) if over or job.process is None else None
                if outcome is not None:
                    jobs.running.remove(job)
                    report(job.point, outcome)
            time.sleep(0.1)
    except BaseException as error:
        hung_up = isinstance(error, SystemExit) and error.code == 128 + signal.SIGHUP
        jobs.stop(cancel=not hung_up)
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _settings(point: Point) -> str:
    return repr(point.launcher)


class _Jobs:
    """The jobs of a sweep that run, or wait in Slurm's queue."""

    def __init__(self, folder: Path, code: Path) -> None:
        self.folder = folder
        # Imports come from the copy of the code, then from the user's own folders, not from the one this runs in.
        folders = filter(None, (str(code.resolve()), os.environ.get("PYTHONPATH")))
        self.variables = {"PYTHONPATH": os.pathsep.join(folders), "PYTHONSAFEPATH": "1"}
        self.running: list[Running] = []
        self.numbers = count()

    def slurm_ids(self) -> list[str]:
        return [job.job_id for job in self.running if job.process is None]

    def start(self, point: Point) -> bool:
        """Start a point's job on this machine if there is room beside those that run."""
        here = [job for job in self.running if job.process is not None]
        gpus = free_gpus(point, here)
        if gpus is None or len(here) >= (point.launcher.parallel_jobs or math.inf):
            return False
        job = Running(point, f"{os.getpid()}-{next(self.numbers)}", self.folder, gpus=gpus)
        paths = job.paths()
        paths.folder.mkdir(parents=True, exist_ok=True)
        end_file(paths).unlink(missing_ok=True)  # of an earlier process with this id
        paths.submitted_pickle.write_bytes(pickle.dumps((os.getpid(), point.job)))
        environment = {**os.environ, **self.variables, "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
        command = [sys.executable, "-u", "-m", "launch.jobs", str(self.folder), job.job_id]
        with paths.stdout.open("w", encoding="utf-8") as out, paths.stderr.open("w", encoding="utf-8") as errors:
            job.process = subprocess.Popen(command, env=environment, stdout=out, stderr=errors, process_group=0)
        self.running.append(job)
        return True

    def submit(self, points: list[Point]) -> None:
        """Submit points with equal settings as one job array."""
        ids = slurm.submit([point.job for point in points], points[0].launcher, self.folder, self.variables)
        for point, job_id in zip(points, ids, strict=True):
            slurm.remember_job(point.run_dir, job_id, point.described)
            self.follow(point, job_id, "submitted")

    def follow(self, point: Point, job_id: str, how: str) -> None:
        self.running.append(Running(point, job_id, self.folder))
        logger.info("job %s is %s: %s", job_id, how, point.name)

    def stop(self, *, cancel: bool) -> None:
        """Stop this machine's jobs and wait until they have saved; a second interrupt kills them. Slurm's: `cancel`."""
        if cancel and (ids := self.slurm_ids()):
            slurm.ask("scancel", *ids)
            with suppress(OSError):
                print(f"\ncancelled {', '.join(ids)}; the same command resumes their runs", file=sys.stderr)
        processes = [job.process for job in self.running if job.process is not None]
        deadline = time.monotonic() + STOP_S
        try:
            for process in processes:
                process.terminate()
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                time.sleep(0.2)
                for job in self.running:
                    job.show()
        finally:
            for process in processes:
                process.kill()


def free_gpus(point: Point, here: list[Running]) -> list[int] | None:
    """Return the GPUs for a new job here, None while too few are free; raise `ParallelError` if there are too few."""
    n_gpus, asked = visible_gpus(), point.launcher.gpus_per_node or 0
    if asked > n_gpus:
        raise ParallelError(f"launcher.gpus_per_node ({asked}) must be at most the number of GPUs here ({n_gpus})")
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    ours = list(map(int, names)) if all(name.isdigit() for name in names) else list(range(n_gpus))
    free = [gpu for gpu in ours[:n_gpus] if not any(gpu in job.gpus for job in here)]
    wanted = point.launcher.gpus_per_job(n_gpus)
    return free[:wanted] if len(free) >= wanted else None


def _main(folder: str, job_id: str) -> None:
    """Run a job of this machine, which is asked to save and stop when its client dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    paths = JobPaths(folder, job_id=job_id, task_id=0)
    client, job = pickle.loads(paths.submitted_pickle.read_bytes())
    if os.getppid() == client:
        job(paths)


if __name__ == "__main__":
    _main(*sys.argv[1:])
