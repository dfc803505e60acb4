"""How a model is laid out on devices. Free of torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum


class Device(Enum):
    auto = "auto"  # cuda when there is one
    cpu = "cpu"
    cuda = "cuda"


class Compile(Enum):
    auto = "auto"  # blocks on a CUDA device, none elsewhere
    blocks = "blocks"  # the parts of each block around attention, by torch.compile
    none = "none"


class ActivationCheckpointing(Enum):
    none = "none"
    full = "full"  # keep only the input of each block, compute it again in the backward pass
    fraction = "fraction"  # do so for the first `activation_checkpointing_fraction` of the blocks


class ParallelError(Exception):
    """A layout that this machine cannot run, told as a sentence for the user."""


class RankError(Exception):
    """How one of several ranks failed: whole lines for the user, its traceback among them."""


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    device: Device = Device.auto
    local_processes: int | None = None  # ranks that `python train.py` starts here (null: one a GPU)
    threads: int | None = None  # CPU threads (null: all of this process's cores)
    compile: Compile = Compile.auto
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    activation_checkpointing_fraction: float = 0.5

    def problems(self) -> Iterator[str]:
        if not 0 <= self.activation_checkpointing_fraction <= 1:
            yield (
                f"parallel.activation_checkpointing_fraction ({self.activation_checkpointing_fraction}) "
                "must be in [0, 1]"
            )
        if self.local_processes is not None and self.local_processes < 1:
            yield f"parallel.local_processes ({self.local_processes}) must be at least 1, or null for one a GPU"
        if self.threads is not None and self.threads < 1:
            yield f"parallel.threads ({self.threads}) must be at least 1, or null for all cores"


class Where(Enum):
    local = "local"
    slurm = "slurm"


TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):(\d{2})(?::(\d{2}))?")  # [days-]hours:minutes[:seconds]


@dataclass(kw_only=True, slots=True)
class LauncherConfig:
    """Where the points of a sweep run, each a job of its own."""

    where: Where = Where.local
    parallel_jobs: int | None = 1  # points at one time (null: all); on this machine they share its GPUs
    nodes: int = 1
    gpus_per_node: int | None = None  # of a job (null: no GPU is asked for; on this machine: its share)
    tasks_per_node: int | None = None  # ranks (null: one a GPU, or one)
    cpus_per_task: int | None = None
    mem_gb: int | None = None  # of a node
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str = "24:00:00"  # [days-]hours:minutes[:seconds] that a job may take before it is requeued
    save_before_s: int = 120  # seconds before the time limit at which a run saves; Slurm may take 60 more
    sbatch: dict[str, str] = field(default_factory=dict)  # other options: {mail-type: END}
    srun_args: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)  # shell lines before srun: [module load cuda]
    max_requeues: int = 20
    requeue_crashes: bool = False  # requeue a run that crashed, unless it crashed the same way at the same step
    poll_s: float = 10.0  # seconds between questions to Slurm

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def time_s(self) -> int:
        found = TIME.fullmatch(self.time)
        assert found, self.time
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    def problems(self) -> Iterator[str]:
        for key in ("parallel_jobs", "nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "mem_gb"):
            value = getattr(self, key)
            if value is not None and value < 1:
                yield f"launcher.{key} ({value}) must be at least 1"
        for key in ("max_requeues", "save_before_s"):
            if getattr(self, key) < 0:
                yield f"launcher.{key} ({getattr(self, key)}) must be 0 or more"
        if not self.poll_s > 0:
            yield f"launcher.poll_s ({self.poll_s}) must be positive"
        if not TIME.fullmatch(self.time):
            yield f"launcher.time ({self.time}) must look like 24:00:00 or 2-12:00:00 (days-hours:minutes:seconds)"
        elif self.save_before_s >= self.time_s:
            yield f"launcher.save_before_s ({self.save_before_s}) must be less than launcher.time ({self.time})"
        if self.where is Where.local and self.nodes > 1:
            yield f"launcher.nodes ({self.nodes}) must be 1 with launcher=local; launcher=slurm has more"
        if self.where is Where.local and self.setup:
            yield f"launcher.setup ({self.setup}) is for launcher=slurm; on this machine, run the lines before train.py"
        if self.gpus_per_node and self.tasks_per_node and self.tasks_per_node > self.gpus_per_node:
            yield (
                f"launcher.tasks_per_node ({self.tasks_per_node}) must be at most launcher.gpus_per_node "
                f"({self.gpus_per_node}): a rank has a GPU of its own"
            )
