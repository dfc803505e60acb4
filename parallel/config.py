"""How a model is laid out on devices. Free of torch, so that a wrong layout is refused before a process group exists."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # outer to inner: tp's peers are neighbours


class Device(Enum):
    auto = "auto"  # cuda when there is one
    cpu = "cpu"
    cuda = "cuda"


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


class ParallelError(Exception):
    """A layout that this machine cannot run, told as a sentence for the user."""


class RankError(Exception):
    """How one of several ranks failed: whole lines for the user, its traceback among them."""


class ModelShape(Protocol):
    """What a layout must divide."""

    vocab_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    tie_embeddings: bool


@dataclass(frozen=True, slots=True)
class Axes:
    """The size of every axis of a mesh."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def dp(self) -> int:
        """Ranks that see other samples."""
        return self.dp_replicate * self.dp_shard

    def __str__(self) -> str:
        return " x ".join(f"{axis} {getattr(self, axis)}" for axis in AXES)


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    device: Device = Device.auto
    threads: int | None = None  # CPU threads a process (null: its share of this machine's cores)
    local_processes: int | None = None  # started by train.py itself (null: one a GPU; one on CPU)

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
        yield from self._pipeline_problems()

    def _pipeline_problems(self) -> Iterator[str]:
        schedule, stages = self.pipeline_schedule.value, self.virtual_stages
        legal = {"1f1b": (1, 1), "interleaved_1f1b": (2, None), "zero_bubble": (1, None), "zbv": (2, 2)}
        low, high = legal[schedule]
        if self.pp == 1 and (stages != 1 or schedule not in ("1f1b", "zero_bubble")):
            yield (
                f"parallel.virtual_stages ({stages}) and parallel.pipeline_schedule ({schedule}) need parallel.pp of "
                "at least 2, not 1"
            )
        elif stages < low or stages > (high or stages):
            wanted = f"exactly {low}" if high == low else f"at least {low}"
            yield (
                f"parallel.virtual_stages ({stages}) must be {wanted} with parallel.pipeline_schedule ({schedule})"
            )
        if self.pipeline_layers is not None and any(layers < 1 for layers in self.pipeline_layers):
            yield f"parallel.pipeline_layers ({self.pipeline_layers}) must give every stage at least 1 layer"


def axis_problems(config: ParallelConfig, world_size: int) -> Iterator[str]:
    """Say why the axes do not make a mesh of `world_size` processes."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            yield f"parallel.{axis} ({size}) must be at least 1, or -1 to fill the {world_size} processes"
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        named = " and ".join(f"parallel.{axis} (-1)" for axis in open_axes)
        yield f"{named}: only one axis can fill the {world_size} processes; give the others a size"
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        return
    fixed = {axis: size for axis, size in sizes.items() if size > 1}
    product = math.prod(fixed.values())
    named = " x ".join(f"parallel.{axis} ({size})" for axis, size in fixed.items())
    if open_axes and world_size % product:
        yield (
            f"parallel.{open_axes[0]} (-1) cannot fill the {world_size} processes: {named} = {product} does not divide "
            f"{world_size}; start a multiple of {product}, or choose from {_divisors(world_size)}"
        )
    elif not open_axes and product != world_size:
        yield (
            f"{named or 'parallel: every axis is 1, which'} = {product} must be the number of processes ({world_size}); "
            f"set one axis to -1, as in parallel=zero1, or start {product}"
        )


def resolve_axes(config: ParallelConfig, world_size: int) -> Axes:
    """Fill in the axis that is -1; raises `ParallelError` if the axes do not make a mesh of `world_size`."""
    problems = list(axis_problems(config, world_size))
    if problems:
        raise ParallelError("\n".join(problems))
    sizes = {axis: getattr(config, axis) for axis in AXES}
    filled = world_size // math.prod(size for size in sizes.values() if size != -1)
    return Axes(**{axis: filled if size == -1 else size for axis, size in sizes.items()})


def layout_problems(
    config: ParallelConfig, world_size: int, *, model: ModelShape, pack_len: int, micro_batches: Sequence[int]
) -> Iterator[str]:
    """Say everything that keeps a model and its batches from being laid out on `world_size` processes.

    `micro_batches` are the micro-batches of a step over all ranks, one number for each size a step may have.
    """
    wrong = list(axis_problems(config, world_size))
    if wrong:
        yield from wrong
        return
    axes = resolve_axes(config, world_size)
    yield from _divided("tp", axes.tp, model, ("n_heads", "n_kv_heads", "d_ff", "vocab_size"))
    if model.n_heads % (axes.tp * axes.cp) and model.n_heads % axes.tp == 0:
        yield (
            f"parallel.cp ({axes.cp}) must divide the heads of a rank, model.n_heads ({model.n_heads}) / parallel.tp "
            f"({axes.tp}); choose from {_divisors(model.n_heads // axes.tp)}"
        )
    pieces = axes.cp * (axes.tp if config.sequence_parallel else 1)
    if pack_len % pieces:
        shared = " x parallel.tp, because parallel.sequence_parallel (true) shares tokens too," if pieces > axes.cp else ""
        yield (
            f"parallel.cp ({axes.cp}){shared} = {pieces} must divide the tokens of a pack ({pack_len}); "
            "choose another data.seq_len or data.pack_len"
        )
    for n_batches in micro_batches:
        if n_batches % axes.dp:
            yield (
                f"a step of {n_batches} micro-batches must be divisible by the {axes.dp} data-parallel ranks "
                f"(parallel.dp_replicate {axes.dp_replicate} x parallel.dp_shard {axes.dp_shard}); "
                "change global_batch_tokens, ramp or data.micro_batch_size"
            )
    if axes.pp > 1:
        yield from _stage_problems(config, axes, model, [n // axes.dp for n in micro_batches if n % axes.dp == 0])


def _stage_problems(config: ParallelConfig, axes: Axes, model: ModelShape, micro_batches: list[int]) -> Iterator[str]:
    """Say what keeps layers and micro-batches from filling a pipeline."""
    n_stages, layers = axes.pp * config.virtual_stages, config.pipeline_layers
    named = f"parallel.pp ({axes.pp})"
    if config.virtual_stages > 1:
        named += f" x parallel.virtual_stages ({config.virtual_stages}) = {n_stages} stages"
    if n_stages > model.n_layers:
        yield f"{named} must be at most model.n_layers ({model.n_layers}), because every stage has a layer"
    elif layers is not None and (len(layers) != n_stages or sum(layers) != model.n_layers):
        yield (
            f"parallel.pipeline_layers ({layers}) must be {n_stages} numbers, one a stage, that sum to model.n_layers "
            f"({model.n_layers})"
        )
    if model.tie_embeddings:
        yield f"{named} must be 1 with model.tie_embeddings (true): the first and the last stage would share a weight"
    interleaved = config.pipeline_schedule.value != "1f1b"
    for n_batches in micro_batches:
        if n_batches < n_stages:
            yield (
                f"{named} must be at most the micro-batches a rank runs in a step ({n_batches}), or the pipeline is "
                "never full; raise global_batch_tokens, lower data.micro_batch_size, or lower the data-parallel axes"
            )
        elif interleaved and n_batches % axes.pp:
            yield (
                f"parallel.pipeline_schedule ({config.pipeline_schedule.value}) needs micro-batches a rank in a step "
                f"({n_batches}) that parallel.pp ({axes.pp}) divides; change global_batch_tokens"
            )


def stage_layers(config: ParallelConfig, axes: Axes, n_layers: int) -> list[range]:
    """Give the layers of every stage. The first ones take what does not divide: the last has the head to do."""
    n_stages = axes.pp * config.virtual_stages
    counts = config.pipeline_layers or [n_layers // n_stages + (s < n_layers % n_stages) for s in range(n_stages)]
    ends = [sum(counts[: s + 1]) for s in range(n_stages)]
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]


def _divided(axis: str, size: int, model: ModelShape, keys: Sequence[str]) -> Iterator[str]:
    undivided = [f"model.{key} ({getattr(model, key)})" for key in keys if getattr(model, key) % size]
    if undivided:
        legal = _divisors(math.gcd(*(getattr(model, key) for key in keys)))
        yield f"parallel.{axis} ({size}) must divide {', '.join(undivided)}; choose from {legal}"


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def joined_world_size(environment: Mapping[str, str] = os.environ) -> int | None:
    """Give the number of processes a launcher has started, None if none has; raises `ParallelError`."""
    given = environment.get("WORLD_SIZE")
    if given is None:
        return None
    missing = [key for key in ("RANK", "MASTER_ADDR", "MASTER_PORT") if key not in environment]
    rank = environment.get("RANK", "0")
    if not given.isdecimal() or int(given) < 1:
        raise ParallelError(f"WORLD_SIZE ({given}) must be the number of processes, at least 1")
    if int(given) > 1 and missing:
        raise ParallelError(
            f"WORLD_SIZE ({given}) is set without {', '.join(missing)}; start with torchrun --nproc-per-node {given} "
            "train.py, or unset WORLD_SIZE"
        )
    if not rank.isdecimal() or int(rank) >= int(given):
        raise ParallelError(f"RANK ({rank}) must be in [0, WORLD_SIZE), and WORLD_SIZE is {given}")
    return int(given)


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
