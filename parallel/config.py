"""How a model is laid out on devices, where its processes run, and what a dry run assumes. Free of torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    device: Device = Device.auto
    nproc_per_node: int | None = None  # ranks that `python train.py` starts here (null: one a GPU)
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
        for key, none in (("threads", "all cores"), ("nproc_per_node", "one a GPU")):
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
