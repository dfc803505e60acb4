"""The axes of a mesh, and checks of their sizes that need no process group."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from model.config import ModelConfig
from parallel.config import AXES, ParallelConfig, ParallelError


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
        """Number of ranks with different samples."""
        return self.dp_replicate * self.dp_shard

    def __str__(self) -> str:
        return " x ".join(f"{axis} {getattr(self, axis)}" for axis in AXES)


def resolve_axes(config: ParallelConfig, world_size: int) -> Axes:
    """Return the axes with -1 filled in; raise `ParallelError` unless they multiply to `world_size`."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    named = " x ".join(f"parallel.{axis} ({size})" for axis, size in sizes.items() if size != 1) or "every axis (1)"
    n_open, product = list(sizes.values()).count(-1), math.prod(size for size in sizes.values() if size != -1)
    if n_open > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ParallelError(f"{named}: sizes must be at least 1, and one of them may be -1, to fill the mesh")
    if n_open and world_size % product:
        raise ParallelError(f"{named}: {product} must divide the number of ranks ({world_size})")
    if not n_open and product != world_size:
        raise ParallelError(f"{named} = {product} must be the number of ranks ({world_size}); one axis may be -1")
    return Axes(**{axis: world_size // product if size == -1 else size for axis, size in sizes.items()})


def layout_problems(
    config: ParallelConfig, world_size: int, *, model: ModelConfig, pack_len: int, micro_batches: Sequence[int]
) -> Iterator[str]:
    """Yield the problems of laying out a model and its batches on `world_size` ranks.

    `micro_batches` are the micro-batches per step over all ranks, one entry per batch size of the run.
    """
    try:
        axes = resolve_axes(config, world_size)
    except ParallelError as error:
        yield str(error)
        return
    split = {key: getattr(model, key) for key in ("n_heads", "n_kv_heads", "d_ff", "vocab_size")}
    undivided = ", ".join(f"model.{key} ({size})" for key, size in split.items() if size % axes.tp)
    if undivided:
        yield f"parallel.tp ({axes.tp}) must divide {undivided}; choose from {_divisors(math.gcd(*split.values()))}"
    elif model.n_heads % (axes.tp * axes.cp):
        heads = model.n_heads // axes.tp
        yield f"parallel.cp ({axes.cp}) must divide model.n_heads / parallel.tp ({heads}): {_divisors(heads)}"
    pieces = axes.cp * (axes.tp if config.sequence_parallel else 1)
    if pack_len % pieces:
        named = "parallel.cp" + (" x parallel.tp" if pieces > axes.cp else "")
        yield f"{named} ({pieces}) must divide the tokens of a pack ({pack_len}); change data.seq_len or data.pack_len"
    for n_batches in micro_batches:
        if n_batches % axes.dp:
            yield f"dp_replicate x dp_shard ({axes.dp}) must divide global_batch_tokens in micro-batches ({n_batches})"
    if axes.pp > 1:
        yield from _stage_problems(config, axes, model, [n // axes.dp for n in micro_batches if n % axes.dp == 0])


def _stage_problems(config: ParallelConfig, axes: Axes, model: ModelConfig, micro_batches: list[int]) -> Iterator[str]:
    """Yield the problems of dividing layers and micro-batches among pipeline stages."""
    n_stages, layers, schedule = axes.pp * config.virtual_stages, config.pipeline_layers, config.pipeline_schedule.value
    named = f"parallel.pp x virtual_stages ({n_stages})"
    if n_stages > model.n_layers:
        yield f"{named} must be at most model.n_layers ({model.n_layers})"
    elif layers is not None and (len(layers) != n_stages or sum(layers) != model.n_layers or min(layers) < 1):
        yield f"parallel.pipeline_layers ({layers}) must be {n_stages} numbers above 0 that sum to {model.n_layers}"
    for n_batches in micro_batches:
        if n_batches < n_stages:
            yield f"{named} must be at most the micro-batches per rank ({n_batches}); raise global_batch_tokens"
        elif schedule != "1f1b" and n_batches % axes.pp:
            yield f"parallel.pp ({axes.pp}) must divide the micro-batches per rank ({n_batches}) for {schedule}"


def stage_layers(config: ParallelConfig, axes: Axes, n_layers: int) -> list[range]:
    """Return the layers of every stage; the first stages take the remainder, because the last has the head."""
    n_stages = axes.pp * config.virtual_stages
    counts = config.pipeline_layers or [n_layers // n_stages + (s < n_layers % n_stages) for s in range(n_stages)]
    ends = [sum(counts[: s + 1]) for s in range(n_stages)]
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]


def stages_of(pp_rank: int, pp_size: int, config: ParallelConfig) -> list[int]:
    """Return the indices of a rank's stages: every `pp_size`-th one."""
    return [pp_rank + turn * pp_size for turn in range(config.virtual_stages)]


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
