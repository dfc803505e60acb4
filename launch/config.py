"""Launcher configuration, and the exceptions for user errors. Torch-free."""

import errno
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):(\d{2})(?::(\d{2}))?")  # [days-]hours:minutes[:seconds]
SLURM_ONLY = ("cpus_per_task", "mem_gb", "partition", "account", "qos", "constraint", "sbatch", "srun_args", "setup")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)


class UserError(Exception):
    """An error that the user can fix; printed without a traceback."""


class RankError(Exception):
    """The failure of one of several ranks; the message has the rank's traceback."""


def is_user_error(error: BaseException) -> bool:
    return isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in DISK_ERRORS)


def unless(config: Any, section: str, rule: str, holds: Callable[[Any], bool], *keys: str) -> Iterator[str]:
    """Yield a problem for each key whose value, unless it is null, breaks a rule."""
    for key in keys:
        if (value := getattr(config, key)) is not None and not holds(value):
            yield f"{section}.{key} ({value}) must be {rule}"


class Where(Enum):
    local = "local"
    slurm = "slurm"


@dataclass(kw_only=True, slots=True)
class LauncherConfig:
    """Where the jobs of a sweep run."""

    where: Where = Where.local
    parallel_jobs: int | None = 1  # points at the same time (null: all); local jobs share the GPUs
    nodes: int = 1  # per job
    gpus_per_node: int | None = None  # null: none requested; locally, an equal share
    tasks_per_node: int | None = None  # ranks (null: one per GPU, or one)
    cpus_per_task: int | None = None
    mem_gb: int | None = None  # per node
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str = "24:00:00"  # limit of a job before it is requeued: [days-]hours:minutes[:seconds]
    signal_delay_s: int = 120  # seconds before the time limit at which a run saves; Slurm may take 60 more
    sbatch: dict[str, str] = field(default_factory=dict)  # other options: {mail-type: END}
    srun_args: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)  # shell lines before srun, for example to stage data
    max_requeues: int = 20
    requeue_crashes: bool = False  # requeue a run that crashed, unless it crashed twice at the same step
    poll_s: float = 10.0  # seconds between queries to Slurm

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    def gpus_per_job(self, n_gpus: int) -> int:
        """Return how many of this machine's `n_gpus` a job gets."""
        return self.gpus_per_node or max(1, n_gpus // (self.parallel_jobs or n_gpus)) if n_gpus else 0

    @property
    def time_s(self) -> int:
        found = TIME.fullmatch(self.time)
        assert found, self.time
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    def problems(self) -> Iterator[str]:
        counts = ("parallel_jobs", "nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "mem_gb")
        yield from unless(self, "launcher", "at least 1", lambda x: x >= 1, *counts)
        if not TIME.fullmatch(self.time):
            yield f"launcher.time ({self.time}) must look like 24:00:00 or 2-12:00:00 (days-hours:minutes:seconds)"
        elif not 0 <= self.signal_delay_s < self.time_s:
            yield f"launcher.signal_delay_s ({self.signal_delay_s}) must be less than launcher.time ({self.time})"
        if self.where is Where.local and self.nodes > 1:
            yield f"launcher.nodes ({self.nodes}) must be 1 with launcher=local; use launcher=slurm"
        for key in SLURM_ONLY if self.where is Where.local else ():
            if getattr(self, key):
                yield f"launcher.{key} ({getattr(self, key)}) needs launcher=slurm"
        if (self.tasks_per_node or 0) > (self.gpus_per_node or self.tasks_per_node or 0):
            most = f"launcher.gpus_per_node ({self.gpus_per_node})"
            yield f"launcher.tasks_per_node ({self.tasks_per_node}) must be at most {most}: each rank needs its own GPU"
