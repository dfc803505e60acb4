"""What is asked of Slurm: to run a job, its state, to cancel it, and to requeue it."""

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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.config import LauncherConfig
from parallel.config import ParallelError
from tracking.status import note_followed

OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "GONE", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
MEMORY = "slurm_job.json"  # in a run folder: the job that runs it
ANSWER_S = 120
BY_SBATCHS_NAME = ("nodes", "gpus_per_node", "cpus_per_task", "partition", "account", "qos", "constraint")

logger = logging.getLogger(__name__)


@contextmanager
def _outside_job() -> Iterator[None]:
    """Hide the job that this process may run in, so that what it asks for is not a step of that job."""
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
    """Submit jobs, several as one array, and return their ids; `folder` takes submitit's files."""
    if shutil.which("sbatch") is None:
        raise ParallelError("launcher=slurm needs sbatch; run this where jobs are submitted")
    from submitit.core.utils import FailedJobError
    from submitit.slurm.slurm import SlurmExecutor

    executor = SlurmExecutor(folder, max_num_timeout=config.max_requeues)
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    options = {name: value for name in BY_SBATCHS_NAME if (value := getattr(config, name)) is not None}
    if config.mem_gb:
        options["mem"] = f"{config.mem_gb}G"
    # True is an option without a value, such as exclusive.
    more = {name: True if value.lower() == "true" else value for name, value in config.sbatch.items()}
    executor.update_parameters(
        **options,
        job_name="train",
        time=math.ceil(config.time_s / 60),
        ntasks_per_node=config.ranks_per_node,
        signal_delay_s=config.signal_delay_s,
        array_parallelism=config.parallel_jobs or len(jobs),
        # A failed rank ends the others, which would wait for it in a collective.
        setup=[*exports, "export SLURM_KILL_BAD_EXIT=1", *config.setup],
        # A requeued job appends to its logs; sbatch's open-mode does not reach srun.
        srun_args=["--open-mode=append", *config.srun_args],
        additional_parameters={"requeue": True, **more},
    )
    try:
        return [job.job_id for job in executor.submit_array(list(jobs))]
    except (FailedJobError, subprocess.CalledProcessError) as error:
        raise ParallelError(f"launcher=slurm: {_message(str(error))}") from None


def states(job_ids: Sequence[str]) -> dict[str, str]:
    """Return every job's state: GONE for one that Slurm has forgotten, UNKNOWN while Slurm does not answer.

    squeue first, because sacct needs an accounting database, which not every cluster has.
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
    """Write into a run folder which job runs it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / MEMORY).write_text(json.dumps({"job": job_id, "config": described}), encoding="utf-8")


def queued_job(run_dir: Path, described: dict[str, Any]) -> str | None:
    """Return the job in the queue for a run folder; raises `ParallelError` if it has another configuration."""
    if not (run_dir / MEMORY).exists():
        return None
    noted = json.loads((run_dir / MEMORY).read_text(encoding="utf-8"))
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
    """Have Slurm requeue this job; return why it does not, or "".

    A job that was cancelled or is being requeued is no longer RUNNING, and is left as it is.
    """
    job_id, times = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if times >= max_requeues:
        return f"it was requeued {times} times, and launcher.max_requeues is {max_requeues}"
    if "JobState=RUNNING" not in ask("scontrol", "show", "job", "--oneliner", job_id).stdout:
        return ""
    done = ask("scontrol", "requeue", job_id)
    return _message(done.stderr) if done.returncode else ""


def requeue_slurm_job(run_dir: Path, *, rank: int, max_requeues: int) -> None:
    """In a Slurm job whose ranks have all saved, requeue it or log why not; elsewhere, do nothing.

    Rank 0 asks Slurm and the others wait for it, because a rank that leaves ends the rest.
    """
    if "SLURM_STEP_ID" not in os.environ:
        return
    for signum in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT):
        signal.signal(signum, signal.SIG_IGN)
    attempt = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    answered = run_dir / ".requeue"
    if rank == 0:
        refused = requeue(max_requeues)
        what = f"not requeued: {refused}" if refused else "requeued"
        logger.info("%s", what, extra={"alert": "requeue"})
        note_followed(run_dir, what)
        answered.write_text(attempt, encoding="utf-8")
        return
    deadline = time.monotonic() + ANSWER_S
    while time.monotonic() < deadline and not (answered.exists() and answered.read_text(encoding="utf-8") == attempt):
        time.sleep(0.2)


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm's and return its answer, or a failure after `ANSWER_S`."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=ANSWER_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} did not answer within {ANSWER_S} s")


def _message(text: str) -> str:
    """Return a command's error as one line, in its own words."""
    lines = [line.strip() for line in text.splitlines() if "error" in line or "failure" in line]
    return "; ".join(lines or text.split("\n")[:1])
