"""What is asked of Slurm: whether a job could run, to run it, how it is, to stop it, and to run it again."""

import json
import logging
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.config import LauncherConfig
from parallel.config import ParallelError

OVER = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "GONE", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT",
)  # fmt: skip
MEMORY = "slurm_job.json"  # in a run folder: the job that runs it
ANSWER_S = 120
STACKS_S = 3
UNSEEN = "unseen: "

logger = logging.getLogger(__name__)


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hide the job that this process may run in: what it asks for is another, not a step of that one or like it."""
    inside = "SLURM_JOB_ID" in os.environ
    names = [name for name in os.environ if name.startswith(("SLURM_", "SLURMD_", "SRUN_")) and name != "SLURM_CONF"]
    hidden = {name: os.environ.pop(name) for name in names if inside}
    try:
        yield
    finally:
        os.environ.update(hidden)


@_outside_of_jobs()
def check(config: LauncherConfig, folder: Path, needed: Sequence[tuple[Path, str]] = ()) -> None:
    """Refuse a job that Slurm would refuse, and one whose nodes do not see what it needs; raises `ParallelError`.

    They must see `folder`, this interpreter, and the paths that are `needed`, each with a sentence if this machine does
    not see it either, and "" otherwise. What a job's own set-up lines may bring is not asked for.
    """
    if shutil.which("sbatch") is None:
        raise ParallelError("launcher=slurm: there is no sbatch on this machine; log in where jobs are submitted")
    flags = _flags(config)
    tried = _ask("sbatch", "--test-only", *flags, "--wrap=true")
    if tried.returncode:
        raise ParallelError(f"launcher=slurm: {_words(tried.stderr)}")
    probe = folder.resolve() / ".probe"
    folder.mkdir(parents=True, exist_ok=True)
    remedy = {
        probe: f"{folder.resolve()}; run from a folder that they share, or set hydra.sweep.dir to one",
        Path(sys.executable): f"{sys.executable}, which runs this; install it on a disk that they share",
    }
    remedy = {path: f"launcher=slurm: the nodes do not see {rest}" for path, rest in remedy.items()}
    for path, sentence in needed if not config.setup else ():
        remedy[path] = sentence or f"launcher=slurm: the nodes do not see {path}; put it on a disk that they share"
    probe.touch()
    try:
        unseen = _unseen(list(remedy), config, flags)
    finally:
        probe.unlink()
    if unseen:
        raise ParallelError("\n".join(dict.fromkeys(remedy[path] for path in ([probe] if probe in unseen else unseen))))
    if unseen is None or config.setup:
        for sentence in dict.fromkeys(sentence for _, sentence in needed if sentence):
            logger.warning("on this machine %s; whether the nodes see it could not be asked", sentence)


def _unseen(paths: list[Path], config: LauncherConfig, flags: list[str]) -> list[Path] | None:
    """Ask a node which paths it does not see; None if no node answers, all being busy, say."""
    where = [flag for flag in flags if flag.split("=")[0] in ("--partition", "--account", "--qos", "--constraint")]
    step = ["srun", *where, "--immediate=2", "--time=1", "--ntasks=1", "--quiet", *config.srun_args]
    script = f'for path; do test -e "$path" || echo "{UNSEEN}$path"; done'
    told = _ask(*step, "sh", "-c", script, "sh", *map(str, paths))
    lines = told.stdout.splitlines()
    return None if told.returncode else [path for path in paths if f"{UNSEEN}{path}" in lines]


@_outside_of_jobs()
def submit(
    jobs: Sequence[Callable[[], Any]], config: LauncherConfig, folder: Path, variables: dict[str, str]
) -> list[str]:
    """Queue jobs, several as one array, and give their ids; `folder` takes submitit's files."""
    from submitit.core.utils import FailedJobError
    from submitit.slurm.slurm import SlurmExecutor

    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    executor = SlurmExecutor(folder, max_num_timeout=config.max_requeues)
    wanted = {
        "job_name": "train",
        "time": math.ceil(config.time_s / 60),
        "nodes": config.nodes,
        "ntasks_per_node": config.ranks_per_node,
        "gpus_per_node": config.gpus_per_node,
        "cpus_per_task": config.cpus_per_task,
        "mem": f"{config.mem_gb}GB" if config.mem_gb else None,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "signal_delay_s": config.signal_delay_s,
        "array_parallelism": config.parallel_jobs or len(jobs),
        # A rank that fails ends the others: in a collective they would wait for it.
        "setup": [*exports, "export SLURM_KILL_BAD_EXIT=1", *config.setup],
        # A requeued job goes on in its logs; sbatch's own open-mode does not reach srun.
        "srun_args": ["--open-mode=append", *config.srun_args],
        "additional_parameters": {"requeue": True, **_options(config)},
    }
    executor.update_parameters(**{name: value for name, value in wanted.items() if value is not None})
    try:
        return [job.job_id for job in executor.submit_array(list(jobs))]
    except (FailedJobError, subprocess.CalledProcessError) as error:
        raise ParallelError(f"launcher=slurm: {_words(str(error))}") from None


def states(job_ids: Sequence[str]) -> dict[str, str]:
    """Give every job's state; GONE for one that Slurm has forgotten.

    squeue first, because sacct needs an accounting data base, which not every cluster has.
    """
    arrays = sorted({job_id.split("_")[0] for job_id in job_ids})
    told = _ask("squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(arrays)}", "--format=%i|%T")
    found = dict(line.split("|") for line in told.stdout.split() if "|" in line)
    if told.returncode and "Invalid job id" not in told.stderr:
        return dict.fromkeys(job_ids, "UNKNOWN")  # no answer this time
    forgotten = [job_id for job_id in job_ids if job_id not in found]
    if forgotten and shutil.which("sacct"):
        told = _ask("sacct", "--noheader", "--parsable2", f"--jobs={','.join(forgotten)}", "--format=JobID,State")
        found |= dict(line.split("|")[:2] for line in told.stdout.splitlines() if "|" in line)
    return {job_id: (found.get(job_id) or "GONE").split()[0] for job_id in job_ids}


def cancel(job_ids: Sequence[str]) -> None:
    _ask("scancel", *job_ids)


def remember_job(run_dir: Path, job_id: str, described: dict[str, Any]) -> None:
    """Note in a run folder which job runs it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / MEMORY).write_text(json.dumps({"job": job_id, "config": described}))


def queued_job(run_dir: Path, described: dict[str, Any]) -> str | None:
    """Give the job that runs a run folder or waits to; raises `ParallelError` if it is of another configuration."""
    path = run_dir / MEMORY
    if not path.exists():
        return None
    noted = json.loads(path.read_text())
    job_id = noted["job"]
    if states([job_id])[job_id] in OVER:
        return None
    if noted["config"] != json.loads(json.dumps(described)):
        raise ParallelError(
            f"{run_dir} is that of job {job_id}, which is in the queue with another configuration; "
            f"scancel {job_id}, or pass another name="
        )
    return job_id


def requeue(max_requeues: int) -> str:
    """Ask Slurm to run this job again; gives the reason if it does not, and otherwise "": this process may then end.

    A job that was cancelled or that is being requeued already is no longer RUNNING, and is left as it is.
    """
    job_id = os.environ.get("SLURM_JOB_ID", "")
    times = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if times >= max_requeues:
        return f"it was requeued {times} times, and launcher.max_requeues is {max_requeues}"
    if "JobState=RUNNING" not in _ask("scontrol", "show", "job", "--oneliner", job_id).stdout:
        return ""
    done = _ask("scontrol", "requeue", job_id)
    return _words(done.stderr) if done.returncode else ""


def ask_for_stacks() -> None:
    """Have every rank of this job write to its log where it stands."""
    step = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    _ask("scancel", "--signal=QUIT", step)
    time.sleep(STACKS_S)


def requeue_slurm_job(run_dir: Path, *, rank: int, max_requeues: int) -> None:
    """In a job of Slurm whose ranks have all saved: have it run again, or give the reason on the screen.

    Rank 0 asks; the others wait for the answer, because a rank that leaves ends the rest.
    """
    if "SLURM_STEP_ID" not in os.environ:
        return
    for signum in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT):
        signal.signal(signum, signal.SIG_IGN)
    attempt = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    answered = run_dir / ".requeue"
    if rank == 0:
        refused = requeue(max_requeues)
        if refused:
            print(f"not requeued: {refused}", flush=True)  # where the client reads
        answered.write_text(attempt)
        return
    until = time.monotonic() + ANSWER_S
    while time.monotonic() < until and not (answered.exists() and answered.read_text() == attempt):
        time.sleep(0.2)


def _flags(config: LauncherConfig) -> list[str]:
    """Give a job's options as sbatch and srun take them."""
    options = {
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "nodes": config.nodes,
        "ntasks-per-node": config.ranks_per_node,
        "gpus-per-node": config.gpus_per_node,
        "cpus-per-task": config.cpus_per_task,
        "mem": f"{config.mem_gb}G" if config.mem_gb else None,
        "time": config.time,
        **_options(config),
    }
    given = {name: value for name, value in options.items() if value is not None}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


def _options(config: LauncherConfig) -> dict[str, str | bool]:
    """Give the other options of sbatch; one that is true, such as exclusive, stands alone."""
    return {name: True if value.lower() == "true" else value for name, value in config.sbatch.items()}


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} did not answer within {ANSWER_S} s")


def _words(text: str) -> str:
    """Give a command's complaint as one line, in its own words."""
    lines = [line.strip() for line in text.splitlines() if "error" in line or "failure" in line]
    return "; ".join(lines or text.split("\n")[:1])
