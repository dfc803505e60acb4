"""Slurm: submission, state and requeueing of jobs."""

import json
import logging
import math
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launch.config import LauncherConfig
from parallel.config import ParallelError
from tracking.run_folder import locked
from tracking.status import attempt, note_followed
from training.config import CheckpointError

OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "GONE", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
JOB_FILE = "slurm_job.json"  # in a run folder: the id of its job
REQUEUED = ".requeue"  # in a run folder: the last attempt that was requeued, or refused
TIMEOUT_S = 120  # of a Slurm command
SBATCH_OPTIONS = ("nodes", "gpus_per_node", "cpus_per_task", "partition", "account", "qos", "constraint")

logger = logging.getLogger(__name__)


@contextmanager
def _outside_job() -> Iterator[None]:
    """Hide the variables of a Slurm job that this process runs in, so that commands are not part of that job."""
    prefixes = ("SLURM_", "SLURMD_", "SRUN_") if "SLURM_JOB_ID" in os.environ else ()
    names = [name for name in os.environ if name.startswith(prefixes) and name != "SLURM_CONF"]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


@_outside_job()
def submit(
    jobs: Sequence[Callable[[], Any]], config: LauncherConfig, folder: Path, variables: dict[str, str]
) -> list[str]:
    """Submit jobs as an array and return their ids; `folder` is for submitit's files."""
    if shutil.which("sbatch") is None:
        raise ParallelError("launcher=slurm needs sbatch; run this where jobs are submitted")
    from submitit.core.utils import FailedJobError
    from submitit.slurm.slurm import SlurmExecutor

    executor = SlurmExecutor(folder, max_num_timeout=config.max_requeues)
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    options = {name: value for name in SBATCH_OPTIONS if (value := getattr(config, name)) is not None}
    if config.mem_gb:
        options["mem"] = f"{config.mem_gb}G"
    # submitit writes True as an option without a value, such as --exclusive.
    more = {name: True if value.lower() == "true" else value for name, value in config.sbatch.items()}
    executor.update_parameters(
        **options,
        job_name="train",
        time=math.ceil(config.time_s / 60),
        ntasks_per_node=config.ranks_per_node,
        signal_delay_s=config.signal_delay_s,
        array_parallelism=config.parallel_jobs or len(jobs),
        # When a rank fails, kill the others, which may hang in a collective.
        setup=[*exports, "export SLURM_KILL_BAD_EXIT=1", *config.setup],
        # A requeued job appends to its logs; srun ignores sbatch's open-mode.
        srun_args=["--open-mode=append", *config.srun_args],
        additional_parameters={"requeue": True, **more},
    )
    try:
        return [job.job_id for job in executor.submit_array(list(jobs))]
    except (FailedJobError, subprocess.CalledProcessError) as error:
        raise ParallelError(f"launcher=slurm: {_message(str(error))}") from None


def states(job_ids: Sequence[str]) -> dict[str, str]:
    """Return the state of every job: GONE if Slurm does not know it, UNKNOWN if Slurm does not answer.

    Asks squeue first, because not every cluster has the accounting database that sacct needs.
    """
    if not job_ids:
        return {}
    arrays = sorted({job_id.split("_")[0] for job_id in job_ids})
    answer = ask("squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(arrays)}", "--format=%i|%T")
    found = dict(line.split("|") for line in answer.stdout.split() if "|" in line)
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return dict.fromkeys(job_ids, "UNKNOWN")
    forgotten = [job_id for job_id in job_ids if job_id not in found]
    if forgotten and shutil.which("sacct"):
        answer = ask("sacct", "--noheader", "--parsable2", f"--jobs={','.join(forgotten)}", "--format=JobID,State")
        found |= dict(line.split("|")[:2] for line in answer.stdout.splitlines() if "|" in line)
    return {job_id: (found.get(job_id) or "GONE").split()[0] for job_id in job_ids}


def remember_job(run_dir: Path, job_id: str, described: dict[str, Any]) -> None:
    """Store the id of a run's job in its folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / JOB_FILE).write_text(json.dumps({"job": job_id, "config": described}), encoding="utf-8")


def queued_job(run_dir: Path, described: dict[str, Any]) -> str | None:
    """Return the queued or running job of a run folder; raise `ParallelError` if its configuration differs."""
    if not (run_dir / JOB_FILE).exists():
        return None
    noted = json.loads((run_dir / JOB_FILE).read_text(encoding="utf-8"))
    job_id = noted["job"]
    if states([job_id])[job_id] in OVER:
        return None
    if noted["config"] != json.loads(json.dumps(described)):
        raise ParallelError(
            f"{run_dir} belongs to job {job_id}, in the queue with another configuration; scancel {job_id}, or pass "
            "another name="
        )
    return job_id


def requeue(max_requeues: int) -> str:
    """Requeue this job; return why it cannot be, or "".

    A job that is not RUNNING has been cancelled or is being requeued already; nothing is done.
    """
    job_id, times = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if times >= max_requeues:
        return f"it was requeued {times} times, and launcher.max_requeues is {max_requeues}"
    if "JobState=RUNNING" not in ask("scontrol", "show", "job", "--oneliner", job_id).stdout:
        return ""
    done = ask("scontrol", "requeue", job_id)
    return _message(done.stderr) if done.returncode else ""


def requeue_slurm_job(run_dir: Path, *, rank: int, max_requeues: int) -> None:
    """Requeue this Slurm job, whose ranks have all saved, or log why not; do nothing outside Slurm.

    Rank 0 does it and the others wait, because srun kills all ranks when one exits.
    """
    if "SLURM_STEP_ID" not in os.environ:
        return
    for signum in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT):
        signal.signal(signum, signal.SIG_IGN)
    if rank == 0:
        note_requeue(run_dir, requeue(max_requeues))
        return
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and not _is_noted(run_dir):
        time.sleep(0.2)


def note_requeue(run_dir: Path, refused: str) -> None:
    """Log and record that this job is requeued, or why not, unless another rank has."""
    with suppress(CheckpointError), locked(run_dir, name=f"{REQUEUED}.lock"):  # held: another rank does
        if _is_noted(run_dir):
            return
        what = f"not requeued: {refused}" if refused else "requeued"
        logger.info("%s", what, extra={"alert": "requeue"})
        note_followed(run_dir, what)
        (run_dir / REQUEUED).write_text(attempt(), encoding="utf-8")


def _is_noted(run_dir: Path) -> bool:
    noted = run_dir / REQUEUED
    return noted.exists() and noted.read_text(encoding="utf-8") == attempt()


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command; return its result, or a failure after `TIMEOUT_S`."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} did not answer within {TIMEOUT_S} s")


def _message(text: str) -> str:
    """Return the error lines of a command's output as one line."""
    lines = [line.strip() for line in text.splitlines() if "error" in line or "failure" in line]
    return "; ".join(lines or text.split("\n")[:1])
