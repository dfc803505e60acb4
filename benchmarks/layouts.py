"""Memory and communication of InternLM-7B on 1,024 GPUs by layout: python -m benchmarks.layouts

Prints the table of docs/parallel.md from dry runs, and plots docs/parallel.svg. Takes minutes, without a GPU.
"""

from pathlib import Path

from hydra import compose, initialize_config_dir

from conf.cli import CONF
from conf.schema import register, to_config
from dry_run.run import GIB
from dry_run.step_profile import StepProfile, profile_step
from parallel.axes import resolve_axes

WORLD_SIZE, NODE = 1024, 8
LAYOUTS = {
    "ddp": ["parallel=ddp"],
    "zero1": ["parallel=zero1"],
    "zero2": ["parallel=zero2"],
    "zero3": ["parallel=zero3"],
    "hybrid_zero": ["parallel=hybrid_zero"],
    "hybrid_zero, stage 2": ["parallel=hybrid_zero", "parallel.zero_stage=2"],
    "hybrid_zero, stage 3": ["parallel=hybrid_zero", "parallel.zero_stage=3"],
    "tp 8 x zero1": ["parallel=tp_zero1", "parallel.tp=8"],
    "pp 4 x hybrid_zero": ["parallel=hybrid_zero", "parallel.pp=4"],
    "pp 4 x hybrid_zero, stage 2": ["parallel=hybrid_zero", "parallel.pp=4", "parallel.zero_stage=2"],
    "pp 4 x hybrid_zero, stage 3": ["parallel=hybrid_zero", "parallel.pp=4", "parallel.zero_stage=3"],
    "3d: pp 2 x tp 2 x zero1": ["parallel=3d"],
    "cp 2 x zero1": ["parallel=cp"],
}
KINDS = {
    "parameters": "#4c78a8",
    "gradients": "#f58518",
    "optimizer": "#54a24b",
    "activations": "#b279a2",
    "logits": "#9d755d",
    "communication": "#bab0ac",
}
PLOT = Path("docs/parallel.svg")


def profile(overrides: list[str]) -> StepProfile:
    """Profile a step of 4 micro-batches of 2 x 2,048 tokens on the rank that needs the most memory."""
    settings = [
        "dry_run='true'", f"dry_run.world_size={WORLD_SIZE}", "model=7b", "data=random", "data.seq_len=2048",
        "data.micro_batch_size=2", "parallel.reduce_dtype=bf16",
    ]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = to_config(compose("train", overrides=[*settings, *overrides]))
    n_micro_batches = max(4, resolve_axes(config.parallel, WORLD_SIZE).pp * config.parallel.virtual_stages)
    return max(profile_step(config, n_micro_batches), key=lambda found: found.peak_bytes)


def sent(profile: StepProfile) -> tuple[int, int]:
    """Return the bytes of collectives within a node and between nodes."""
    items = [item for phase in profile.phases for item in phase.collectives]
    between = [len({rank // NODE for rank in item.ranks}) > 1 for item in items]
    within = sum(item.n_bytes for item, leaves_node in zip(items, between, strict=True) if not leaves_node)
    return within, sum(item.n_bytes for item in items) - within


def rows(profiles: dict[str, StepProfile]) -> list[str]:
    lines = [
        "| layout | peak, GiB | parameters | gradients | optimizer | activations | in a node, GB | between nodes, GB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, found in profiles.items():
        kinds = [f"{found.bytes_at_peak[kind] / GIB:.1f}" for kind in list(KINDS)[:4]]
        traffic = [f"{n_bytes / 1e9:.2f}" for n_bytes in sent(found)]
        lines.append(f"| `{name}` | {found.peak_bytes / GIB:.1f} | {' | '.join([*kinds, *traffic])} |")
    return lines


def plot(profiles: dict[str, StepProfile]) -> None:
    """Plot memory by kind, and bytes within and between nodes, one row per layout."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    memory, communication = figure.subplots(1, 2, sharey=True)
    traffic = list(zip(*map(sent, profiles.values()), strict=True))
    bars = [
        (memory, kind, color, GIB, [p.bytes_at_peak[kind] for p in profiles.values()]) for kind, color in KINDS.items()
    ]
    bars += [
        (communication, "within a node", "#72b7b2", 1e9, traffic[0]),
        (communication, "between nodes", "#e45756", 1e9, traffic[1]),
    ]
    ends = {memory: [0.0] * len(profiles), communication: [0.0] * len(profiles)}
    for axes, label, color, unit, n_bytes in bars:
        sizes = [size / unit for size in n_bytes]
        axes.barh(list(profiles), sizes, left=ends[axes], color=color, label=label)
        ends[axes] = [end + size for end, size in zip(ends[axes], sizes, strict=True)]
    memory.set_title("peak memory per GPU, GiB")
    communication.set_title("collectives per step and GPU, GB")
    memory.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=len(bars), fontsize="small")
    figure.supxlabel(
        f"InternLM-7B on {WORLD_SIZE:,} GPUs in nodes of {NODE}, 4 micro-batches of 4,096 tokens, by dry runs"
    )
    figure.savefig(PLOT)


def main() -> None:
    register()
    profiles = {}
    for name, overrides in LAYOUTS.items():
        profiles[name] = profile(overrides)
        print(f"{name}: {profiles[name].collectives}", flush=True)
    print(*rows(profiles), sep="\n")
    plot(profiles)


if __name__ == "__main__":
    main()
