"""Configuration of the parallel layout."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from launch.config import UserError

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # outer to inner: tp ranks are neighbours


class Device(Enum):
    auto = "auto"  # cuda if available
    cpu = "cpu"
    cuda = "cuda"


class Compile(Enum):
    auto = "auto"  # blocks on a CUDA device, else none
    blocks = "blocks"  # torch.compile of the parts of each block around attention
    none = "none"


class ActivationCheckpointing(Enum):
    none = "none"
    selective = "selective"  # keep matrix products and attention, recompute norms and activation functions
    full = "full"  # keep only the input of each block, recompute the rest in the backward pass
    fraction = "fraction"  # the same for the first `activation_checkpointing_fraction` of the blocks


class ReduceDtype(Enum):
    bf16 = "bf16"
    fp32 = "fp32"


# Functional syntax: 1f1b is not an identifier. One stage per rank (Narayanan et al. 2019, PipeDream-flush), or
# virtual_stages per rank (arXiv:2104.04473).
Schedule = Enum("Schedule", {"1f1b": "1f1b", "interleaved_1f1b": "interleaved_1f1b"})


class ParallelError(UserError):
    """A layout that cannot run."""


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    device: Device = Device.auto
    nproc_per_node: int | None = None  # ranks that `python train.py` starts (null: one per GPU)
    threads: int | None = None  # CPU threads per rank (null: an equal share of the cores)
    compile: Compile = Compile.auto
    cuda_graphs: bool = False  # record and replay a step's kernels, if launching them limits the speed

    # the axes of the mesh multiply to the number of ranks; one of them may be -1 (fill)
    pp: int = 1  # pipeline stages
    dp_replicate: int = 1  # replicas of each shard
    dp_shard: int = 1  # ranks that shard what zero_stage says
    cp: int = 1  # ranks that split each sequence
    tp: int = 1  # ranks that split each matrix

    # sharded over dp_shard x cp: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters
    zero_stage: int = 0
    reduce_dtype: ReduceDtype = ReduceDtype.fp32  # of the gradient reduction over data-parallel ranks
    sequence_parallel: bool = True  # under tp, split norms and residuals over tokens
    async_tp: bool = False  # overlap matrix products with the collectives of sequence parallelism
    pipeline_schedule: Schedule = Schedule["1f1b"]
    virtual_stages: int = 1  # pipeline stages per rank
    pipeline_layers: list[int] | None = None  # layers per stage (null: as even as possible)

    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    activation_checkpointing_fraction: float = 0.5

    init_timeout_s: float = 300.0  # for all ranks to join
    step_timeout_s: float = 600.0  # of a collective, after which ranks that wait for a dead or hanging one fail

    def compiles(self, device_type: str) -> bool:
        """Return whether blocks are compiled on a device."""
        return self.compile is Compile.blocks or (self.compile is Compile.auto and device_type == "cuda")

    def problems(self) -> Iterator[str]:
        if self.zero_stage not in (0, 1, 2, 3):
            yield f"parallel.zero_stage ({self.zero_stage}) must be 0, 1, 2 or 3"
        if self.zero_stage == 0 and self.dp_shard != 1:
            yield f"parallel.dp_shard ({self.dp_shard}) needs zero_stage 1, 2 or 3; with 0 use parallel.dp_replicate"
        eager, on_cpu = self.compile is Compile.none, self.device is Device.cpu
        if self.async_tp and (self.tp == 1 or not self.sequence_parallel or eager or on_cpu):
            yield "parallel.async_tp (true) needs tp of 2 or more, sequence_parallel, compile and a CUDA device"
        if self.cuda_graphs and (on_cpu or self.pp != 1):
            yield "parallel.cuda_graphs (true) needs device cuda and pp 1; set it to false"
        schedule, stages = self.pipeline_schedule.value, self.virtual_stages
        if self.pp != 1 and (stages == 1) != (schedule == "1f1b"):
            yield f"parallel.virtual_stages ({stages}) must be 1 for 1f1b and 2 or more for interleaved_1f1b"
