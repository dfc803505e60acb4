"""How a model is laid out on devices, where its processes run, and what a dry run assumes. Free of torch."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from importlib.metadata import version

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # outer to inner: tp's peers are neighbours


class Device(Enum):
    auto = "auto"  # cuda when there is one
    cpu = "cpu"
    cuda = "cuda"


class Compile(Enum):
    auto = "auto"  # blocks on a CUDA device, none elsewhere and where a schedule splits the backward pass
    blocks = "blocks"  # the parts of each block around attention, by torch.compile
    none = "none"


class ActivationCheckpointing(Enum):
    none = "none"
    full = "full"  # keep only the input of each block, compute it again in the backward pass
    fraction = "fraction"  # do so for the first `activation_checkpointing_fraction` of the blocks


class ReduceDtype(Enum):
    bf16 = "bf16"
    fp32 = "fp32"


# By these names because a schedule is known as 1F1B, which is no identifier.
Schedule = Enum(
    "Schedule",
    {
        "1f1b": "1f1b",  # one stage a rank (Narayanan et al. 2019, PipeDream-flush)
        "interleaved_1f1b": "interleaved_1f1b",  # virtual_stages a rank (arXiv:2104.04473)
        "zero_bubble": "zero_bubble",  # interleaved, weight gradients fill the bubbles (arXiv:2401.10241)
        "zbv": "zbv",  # two stages a rank, laid out as a V (arXiv:2405.15362)
    },
)


# A compiled backward pass is one piece, which gives the gradients of inputs and of weights together.
SPLIT_BACKWARD = (Schedule["zero_bubble"], Schedule["zbv"])
# Before it torch adds up what reaches several outputs of a node, and takes no inputs but tensors.
SPLIT_BACKWARD_TORCH = (2, 13)


class ParallelError(Exception):
    """A layout that this machine cannot run, told as a sentence for the user."""


def no_fp8(scaling: str, where: str) -> ParallelError:
    return ParallelError(
        f"precision.fp8 ({scaling}) needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell), "
        f"not {where}; choose precision.fp8=none"
    )


def no_graphs(where: str) -> ParallelError:
    return ParallelError(f"parallel.cuda_graphs (true) needs a CUDA device, not {where}; choose false")


class RankError(Exception):
    """How one of several ranks failed: whole lines for the user, its traceback among them."""


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    device: Device = Device.auto
    local_processes: int | None = None  # ranks that `python train.py` starts here (null: one a GPU)
    threads: int | None = None  # CPU threads a process (null: its share of this machine's cores)
    compile: Compile = Compile.auto
    cuda_graphs: bool = False  # launch a micro-batch as one, and the update: for small models on one GPU

    # the mesh: the axes multiply to the number of processes, and one of them may be -1, which fills it
    pp: int = 1  # pipeline stages
    dp_replicate: int = 1  # groups that hold the same shards
    dp_shard: int = 1  # ranks of a group, each with a shard
    cp: int = 1  # ranks that share the tokens of a sequence
    tp: int = 1  # ranks that share each matrix

    # what dp_shard x cp shards: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too
    zero_stage: int = 0
    reduce_dtype: ReduceDtype = ReduceDtype.fp32  # in which gradients are summed over data-parallel ranks
    sequence_parallel: bool = True  # under tp, norms and residuals hold a share of the tokens each
    async_tp: bool = False  # let matrix products overlap the messages of sequence parallelism, piece by piece
    pipeline_schedule: Schedule = Schedule["1f1b"]
    virtual_stages: int = 1  # stages a pipeline rank runs
    pipeline_layers: list[int] | None = None  # layers of each stage in order (null: as even as they go)

    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    activation_checkpointing_fraction: float = 0.5

    init_timeout_s: float = 300.0  # until every process has joined
    step_timeout_s: float = 600.0  # of a collective: the ranks that wait for a dead or hanging one end after it

    def problems(self) -> Iterator[str]:
        if not 0 <= self.activation_checkpointing_fraction <= 1:
            yield (
                f"parallel.activation_checkpointing_fraction ({self.activation_checkpointing_fraction}) "
                "must be in [0, 1]"
            )
        for key, none in (("threads", "all cores"), ("local_processes", "one a GPU")):
            value = getattr(self, key)
            if value is not None and value < 1:
                yield f"parallel.{key} ({value}) must be at least 1, or null for {none}"
        for key in ("init_timeout_s", "step_timeout_s"):
            if not 0 < getattr(self, key) < math.inf:
                yield f"parallel.{key} ({getattr(self, key)}) must be positive and finite"
        if self.zero_stage not in (0, 1, 2, 3):
            yield f"parallel.zero_stage ({self.zero_stage}) must be 0, 1, 2 or 3"
        if self.zero_stage == 0 and self.dp_shard != 1:
            yield (
                f"parallel.dp_shard ({self.dp_shard}) must be 1 with parallel.zero_stage (0), which shards nothing; "
                "use parallel.dp_replicate, or zero_stage 1, 2 or 3"
            )
        for key, wrong, needed in (
            ("tp", self.tp == 1, "of 2 or more, or -1"),
            ("sequence_parallel", not self.sequence_parallel, "true"),
            ("compile", self.compile is Compile.none, "auto or blocks"),
            ("device", self.device is Device.cpu, "cuda"),
        ):
            if self.async_tp and wrong:
                value = getattr(self, key)
                shown = value.value if isinstance(value, Enum) else value
                yield f"parallel.async_tp (true) needs parallel.{key} {needed}, not {shown}"
        for key in AXES if self.cuda_graphs else ():
            if getattr(self, key) != 1:
                value = getattr(self, key)
                yield f"parallel.cuda_graphs (true) needs one GPU, parallel.{key} 1, not {value}; choose false"
        if self.cuda_graphs and self.device is Device.cpu:
            yield "parallel.cuda_graphs (true) needs parallel.device cuda, not cpu; choose false"
        yield from self._pipeline_problems()

    def _pipeline_problems(self) -> Iterator[str]:
        schedule, stages = self.pipeline_schedule.value, self.virtual_stages
        torch = tuple(map(int, version("torch").split(".")[:2]))
        if self.pp != 1 and self.pipeline_schedule in SPLIT_BACKWARD and torch < SPLIT_BACKWARD_TORCH:
            yield (
                f"parallel.pipeline_schedule ({schedule}) needs torch 2.13 or later, not {version('torch')}, "
                "which splits a backward pass wrongly; install it, or use interleaved_1f1b"
            )
        if self.pp != 1 and self.compile is Compile.blocks and self.pipeline_schedule in SPLIT_BACKWARD:
            yield (
                f"parallel.compile (blocks) does not go with parallel.pipeline_schedule ({schedule}), which computes "
                "the gradients of weights later than those of inputs; use parallel.compile=auto, or interleaved_1f1b"
            )
        legal = {"1f1b": (1, 1), "interleaved_1f1b": (2, None), "zero_bubble": (1, None), "zbv": (2, 2)}
        low, high = legal[schedule]
        if self.pp == 1 and (stages != 1 or schedule not in ("1f1b", "zero_bubble")):
            yield (
                f"parallel.virtual_stages ({stages}) and parallel.pipeline_schedule ({schedule}) need parallel.pp of "
                "at least 2, not 1"
            )
        elif stages < low or stages > (high or stages):
            wanted = f"exactly {low}" if high == low else f"at least {low}"
            yield (f"parallel.virtual_stages ({stages}) must be {wanted} with parallel.pipeline_schedule ({schedule})")
        if self.pipeline_layers is not None and any(layers < 1 for layers in self.pipeline_layers):
            yield f"parallel.pipeline_layers ({self.pipeline_layers}) must give every stage at least 1 layer"


class Where(Enum):
    local = "local"
    slurm = "slurm"


TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):(\d{2})(?::(\d{2}))?")  # [days-]hours:minutes[:seconds]
SLURM_ONLY = ("cpus_per_task", "mem_gb", "partition", "account", "qos", "constraint", "sbatch", "srun_args", "setup")


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

    def gpus_of_a_job(self, n_gpus: int) -> int:
        """GPUs that a job of this machine has out of `n_gpus`: as many as it asks for, or its share."""
        return self.gpus_per_node or max(1, n_gpus // (self.parallel_jobs or n_gpus)) if n_gpus else 0

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
        for key in SLURM_ONLY if self.where is Where.local else ():
            if getattr(self, key):
                yield f"launcher.{key} ({getattr(self, key)}) is for launcher=slurm; pass that too, or leave it out"
        if self.gpus_per_node and self.tasks_per_node and self.tasks_per_node > self.gpus_per_node:
            yield (
                f"launcher.tasks_per_node ({self.tasks_per_node}) must be at most launcher.gpus_per_node "
                f"({self.gpus_per_node}): a rank has a GPU of its own"
            )


@dataclass(kw_only=True, slots=True)
class DryRunConfig:
    """A step on ranks and GPUs that are not there, and the machine it is timed for (defaults: H100 or H200, NVLink,
    one 400 Gb/s card a GPU).

    Rates are what a kernel or a link reaches by its data sheet, in one direction; `*_efficiency` and `overlap`
    are shares of it.
    """

    enabled: bool = False
    world_size: int = 1
    devices_per_node: int = 8
    device_memory_gib: float = 139.0
    peak_tflops: float = 989.0
    flops_efficiency: float = 0.75  # of matrix products
    memory_gbps: float = 3350.0  # GB/s
    memory_efficiency: float = 0.8  # of everything that is no product
    intra_node_gbps: float = 360.0  # GB/s of a GPU to the others of its node
    inter_node_gbps: float = 45.0  # GB/s of a GPU to other nodes
    intra_node_latency_us: float = 1.0  # of a hop of a ring
    inter_node_latency_us: float = 6.0
    launch_us: float = 20.0  # of a collective
    overlap: float = 0.9  # share of computing behind which FSDP's collectives fit
    workspace_mib: int = 64  # that the libraries of products keep

    def problems(self) -> Iterator[str]:
        for key in ("world_size", "devices_per_node"):
            if getattr(self, key) < 1:
                yield f"dry_run.{key} ({getattr(self, key)}) must be at least 1"
        for key in ("peak_tflops", "memory_gbps", "intra_node_gbps", "inter_node_gbps", "device_memory_gib"):
            if not getattr(self, key) > 0:
                yield f"dry_run.{key} ({getattr(self, key)}) must be positive"
        for key in ("flops_efficiency", "memory_efficiency"):
            if not 0 < getattr(self, key) <= 1:
                yield f"dry_run.{key} ({getattr(self, key)}) must be in (0, 1]"
        if not 0 <= self.overlap <= 1:
            yield f"dry_run.overlap ({self.overlap}) must be in [0, 1]"
        for key in ("intra_node_latency_us", "inter_node_latency_us", "launch_us", "workspace_mib"):
            if getattr(self, key) < 0:
                yield f"dry_run.{key} ({getattr(self, key)}) must be 0 or more"
