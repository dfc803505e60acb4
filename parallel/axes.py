"""The axes of a mesh and what they must divide. Free of torch: what is wrong is told before a process group exists."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from parallel.config import AXES, ParallelConfig, ParallelError


class ModelShape(Protocol):
    """What a layout must divide."""

    vocab_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int


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
        named = named or "parallel (every axis 1)"
        yield (
            f"{named} = {product} must be the number of processes ({world_size}); "
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
        shared = (
            " x parallel.tp, because parallel.sequence_parallel (true) shares tokens too," if pieces > axes.cp else ""
        )
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


def stages_of(pp_rank: int, pp_size: int, config: ParallelConfig) -> list[int]:
    """Give the numbers of a rank's stages: rounds in the same direction, or there and back for zbv."""
    if config.pipeline_schedule.value == "zbv":
        return [pp_rank, 2 * pp_size - 1 - pp_rank]
    return [pp_rank + turn * pp_size for turn in range(config.virtual_stages)]


def _divided(axis: str, size: int, model: ModelShape, keys: Sequence[str]) -> Iterator[str]:
    undivided = [f"model.{key} ({getattr(model, key)})" for key in keys if getattr(model, key) % size]
    if undivided:
        legal = _divisors(math.gcd(*(getattr(model, key) for key in keys)))
        yield f"parallel.{axis} ({size}) must divide {', '.join(undivided)}; choose from {legal}"


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
