"""The report of `dry_run=true`: a training step on fake ranks and GPUs."""

from dataclasses import asdict
from textwrap import fill

from conf.schema import TrainConfig
from dry_run.step_profile import profile_step
from model.counts import count_params
from parallel.axes import resolve_axes

GIB = 2**30
INDENT = " " * 11


def run_dry_run(config: TrainConfig) -> None:
    """Print memory, collectives and estimated time of a step, whose batch is rounded to fill all ranks."""
    machine, model, axes = config.dry_run, config.model, resolve_axes(config.parallel, config.dry_run.world_size)
    full = config.micro_batch_tokens * axes.dp
    n_micro_batches = max(1, config.global_batch_tokens // full)
    n_tokens = n_micro_batches * full
    print(f"model      {model.name}: {count_params(model):,} parameters")
    print(f"layout     {axes} = {axes.world_size:,} GPUs, zero_stage {config.parallel.zero_stage}")
    ranks = f"{axes.dp:,} data-parallel ranks x {n_micro_batches} micro-batches x {config.micro_batch_tokens:,}"
    print(f"batch      {n_tokens:,} tokens per step = {ranks}")
    if n_tokens != config.global_batch_tokens:
        print(f"{INDENT}global_batch_tokens ({config.global_batch_tokens:,}) must be a multiple of {full:,} to train")
    profiles = profile_step(config, n_micro_batches)
    for profile in profiles:
        peak, limit = profile.peak_bytes / GIB, machine.device_memory_gib
        above = f", more than dry_run.device_memory_gib ({limit:g})" if peak > limit else ""
        print(f"rank {profile.rank:<6}{profile.n_params:,} parameters held; peak {peak:.2f} GiB{above}:")
        kinds = [f"{kind} {n_bytes / GIB:.2f}" for kind, n_bytes in profile.bytes_at_peak.items() if n_bytes]
        print(f"{INDENT}{', '.join(kinds)}")
    largest = max(profiles, key=lambda profile: profile.peak_bytes)
    where = f", on rank {largest.rank}, which needs the most memory" if len(profiles) > 1 else ""
    print(f"{'collective':<16} {'axis':<22} {'count':>7} {'bytes':>20}   per step{where}")
    for (axis, kind), (count, n_bytes) in largest.collectives.items():
        print(f"{kind:<16} {axis:<22} {count:>7,} {n_bytes:>20,}")
    time = max((profile.time for profile in profiles), key=lambda time: time.total_s)
    rate = n_tokens / axes.world_size / time.total_s
    print(f"step time  {time.total_s:.3f} s, {rate:,.0f} tokens/s per GPU, estimated as:")
    print(f"{INDENT}compute {time.compute_s:.3f}, tensor, context and pipeline collectives {time.blocking_s:.3f},")
    print(f"{INDENT}exposed data-parallel collectives {time.exposed_s:.3f}, pipeline bubble {time.bubble_s:.3f};")
    print(f"{INDENT}of all this the optimizer's update {time.update_s:.3f} ({time.update_s / time.total_s:.1%})")
    inputs = ", ".join(f"dry_run.{key} {value:g}" for key, value in asdict(machine).items() if key != "enabled")
    print(fill(inputs, 100, initial_indent=INDENT, subsequent_indent=INDENT))
