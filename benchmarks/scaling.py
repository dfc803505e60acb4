"""InternLM's published scaling of 7B compared with predictions: python -m benchmarks.scaling

The table is InternLM's (doc/en/train_performance.md, v0.2.1): tokens per GPU and second on A100 80GB, eight per node
with 4 x 100 Gb/s, 4 micro-batches of 2 x 2,048 tokens (tp=1) or 4 x 2,048 (tp=2) per step, without recomputation.

The predicted step time is the computation and tensor-parallel communication of this project's engine, from a dry run
with `dry_run=a100`, plus InternLM's communication,

    exposed + reduce x data-parallel ranks + broadcast x optimizer partitions

because it reduces gradients once per step, after the last backward pass, and then broadcasts the parameters of each
optimizer partition in turn (solver/optimizer/hybrid_zero_optim.py).

The four rows marked * calibrate the share of peak FLOP/s in matrix products, `exposed` (if gradients leave the node),
`reduce` and `broadcast`. The other 28 values, including all with tp=2, are predictions. The last column is the dry
run's estimate, not a measurement, for this engine in the same setting; it gathers parameters in one collective per
block instead of broadcasting partitions.
"""

from dataclasses import replace
from functools import cache

from hydra import compose, initialize_config_dir

from conf.cli import CONF
from conf.schema import register, to_config
from dry_run.config import DryRunConfig
from dry_run.step_profile import StepProfile, compute_s, estimate_time, profile_step
from dry_run.trace import Phase

N_GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
PUBLISHED = {  # (tp, zero1): tokens per GPU and second
    (1, -1): (4062, 3842, 3752, 3690, 3571, 3209, 2861, 2271),
    (1, 8): (4078, 3939, 3919, 3944, 3928, 3920, 3835, 3625),
    (2, -1): (3822, 3595, 3475, 3438, 3308, 3094, 2992, 2785),
    (2, 4): (3761, 3658, 3655, 3650, 3651, 3653, 3589, 3486),
}
CALIBRATED = ((1, 8, 8), (1, 8, 16), (1, 8, 1024), (1, -1, 1024))  # (tp, zero1, GPUs)
TOKENS = 16_384  # per GPU and step


@cache
def on_16_gpus(tp: int) -> tuple[StepProfile, DryRunConfig]:
    """Profile a step of this engine on 16 GPUs with `zero1` 8 / tp, which has every axis of the table."""
    settings = [
        "dry_run=a100", "model=7b", "data=random", "data.seq_len=2048", f"data.micro_batch_size={2 * tp}",
        f"global_batch_tokens={16 * TOKENS}", "parallel.zero_stage=1", f"parallel.dp_shard={8 // tp}",
        "parallel.dp_replicate=2", f"parallel.tp={tp}", "parallel.sequence_parallel=false",
        "parallel.reduce_dtype=bf16", "parallel.compile=none", "dry_run.world_size=16",
    ]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = to_config(compose("train", overrides=settings))
    return profile_step(config, 4)[0], config.dry_run


def regrouped(phases: list[Phase], axes: dict[str, int]) -> list[Phase]:
    """Return rank 0's phases with the ranks of another mesh."""
    return [
        replace(phase, collectives=[replace(item, ranks=ranks_of(item.axis, axes)) for item in phase.collectives])
        for phase in phases
    ]


def ranks_of(axis: str, axes: dict[str, int]) -> tuple[int, ...]:
    """Return rank 0's group over the named axes; `axes` are the sizes, outermost first."""
    ranks, stride = [0], 1
    for name, size in reversed(axes.items()):
        if name in axis.split("+"):
            ranks = [rank + i * stride for i in range(size) for rank in ranks]
        stride *= size
    return tuple(ranks)


def shards(tp: int, zero1: int, n_gpus: int) -> int:
    """Return the number of partitions of the optimizer state."""
    return n_gpus // tp if zero1 < 0 else zero1


def published_s(tp: int, zero1: int, n_gpus: int) -> float:
    return TOKENS / PUBLISHED[tp, zero1][N_GPUS.index(n_gpus)]


def main() -> None:
    register()
    gpus_8_s, gpus_16_s, gpus_1024_s, global_zero_1024_s = (published_s(*row) for row in CALIBRATED)
    broadcast_s = (global_zero_1024_s - gpus_1024_s) / (1024 - 8)
    reduce_s = (gpus_1024_s - gpus_16_s) / (1024 - 16)
    busy_s = gpus_8_s - 8 * reduce_s - 8 * broadcast_s
    exposed_s = gpus_16_s - gpus_8_s - 8 * reduce_s
    profile, machine = on_16_gpus(1)
    compute_total_s = sum(compute_s(phase, machine) for phase in profile.phases)
    products = sum(phase.flops - phase.attention_flops for phase in profile.phases) / (machine.peak_tflops * 1e12)
    efficiency = products / (busy_s - (compute_total_s - products / machine.flops_efficiency))
    machine = replace(machine, flops_efficiency=efficiency)
    print(f"calibrated: matrix products at {efficiency:.1%} of {machine.peak_tflops:g} TFLOP/s,")
    print(f"            exposed {exposed_s * 1e3:.0f} ms, reduce {reduce_s * 1e3:.3f} ms per rank,")
    print(f"            broadcast {broadcast_s * 1e3:.2f} ms per partition")
    print(f"\n{'tp':>2} {'zero1':>5} {'GPUs':>5} {'published':>10} {'predicted':>10} {'error':>7} {'this engine':>12}")
    errors = []
    for (tp, zero1), row in PUBLISHED.items():
        phases = on_16_gpus(tp)[0].phases
        for n_gpus, measured in zip(N_GPUS, row, strict=True):
            parts = shards(tp, zero1, n_gpus)
            axes = {"pp": 1, "dp_replicate": n_gpus // tp // parts, "dp_shard": parts, "cp": 1, "tp": tp}
            estimate = estimate_time(regrouped(phases, axes), machine)
            added = exposed_s * (n_gpus > 8) + reduce_s * n_gpus / tp + broadcast_s * parts
            predicted = TOKENS / (estimate.compute_s + estimate.blocking_s + added)
            fitted = (tp, zero1, n_gpus) in CALIBRATED
            error = predicted / measured - 1
            errors += [] if fitted else [abs(error)]
            mark = "*" if fitted else " "
            print(
                f"{tp:>2} {zero1:>5} {n_gpus:>5} {measured:>10,} {predicted:>9,.0f}{mark} {error:>+7.1%} "
                f"{TOKENS / estimate.total_s:>12,.0f}"
            )
    print(f"\n{len(errors)} predictions: mean error {sum(errors) / len(errors):.1%}, largest {max(errors):.1%}")


if __name__ == "__main__":
    main()
