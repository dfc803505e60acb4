"""A training step on fake ranks and GPUs: what `dry_run=true` prints."""

from collections.abc import Iterator
from dataclasses import asdict
from textwrap import wrap

from conf.schema import TrainConfig
from dry_run.step_profile import profile_step
from parallel.axes import resolve_axes

GIB = 2**30


def run_dry_run(config: TrainConfig) -> None:
    """Print memory, collectives and estimated time of a step on `dry_run.world_size` GPUs."""
    for line in report(config):
        print(line)


def report(config: TrainConfig) -> Iterator[str]:
    """Profile a step and report it line by line; a batch that does not fill the ranks is filled."""
    machine, model, axes = config.dry_run, config.model, resolve_axes(config.parallel, config.dry_run.world_size)
    round_tokens = config.micro_batch_tokens * axes.dp
    n_micro_batches = max(1, config.global_batch_tokens // round_tokens)
    n_tokens = n_micro_batches * round_tokens
    yield f"model      {model.name}: {model.n_params:,} parameters"
    yield f"layout     {axes} = {axes.world_size:,} GPUs, zero_stage {config.parallel.zero_stage}"
    yield (
        f"batch      {n_tokens:,} tokens per step = {axes.dp:,} data-parallel ranks x {n_micro_batches} "
        f"micro-batches x {config.micro_batch_tokens:,}"
    )
    if n_tokens != config.global_batch_tokens:
        yield (
            f"           global_batch_tokens ({config.global_batch_tokens:,}) does not fill these ranks; to train, "
            f"set a multiple of {round_tokens:,}"
        )
    profiles = profile_step(config, n_micro_batches)
    for profile in profiles:
        peak, limit = profile.peak_bytes / GIB, machine.device_memory_gib
        above = f", more than dry_run.device_memory_gib ({limit:g})" if peak > limit else ""
        yield f"rank {profile.rank:<6}{profile.n_params:,} parameters held; peak {peak:.2f} GiB{above}:"
        kinds = [f"{kind} {size / GIB:.2f}" for kind, size in profile.bytes_at_peak.items() if size]
        yield f"           {', '.join(kinds)}"
    largest = max(profiles, key=lambda profile: profile.peak_bytes)
    where = f", on rank {largest.rank}, which needs the most memory" if len(profiles) > 1 else ""
    yield f"{'collective':<16} {'axis':<22} {'count':>7} {'bytes':>20}   per step{where}"
    for (axis, kind), (count, size) in largest.collectives.items():
        yield f"{kind:<16} {axis:<22} {count:>7,} {size:>20,}"
    if not largest.collectives:
        yield "none"
    time = max((profile.time for profile in profiles), key=lambda time: time.total_s)
    tokens_per_gpu = n_tokens / axes.world_size
    yield f"step time  {time.total_s:.3f} s, {tokens_per_gpu / time.total_s:,.0f} tokens/s per GPU, estimated as:"
    yield (
        f"           compute {time.compute_s:.3f}, tensor, context and pipeline collectives {time.blocking_s:.3f}, "
        f"exposed data-parallel collectives {time.exposed_s:.3f}, bubble {time.bubble_s:.3f}"
    )
    inputs = ", ".join(f"dry_run.{key} {value:g}" for key, value in asdict(machine).items() if key != "enabled")
    yield from wrap(inputs, 100, initial_indent=" " * 11, subsequent_indent=" " * 11)
