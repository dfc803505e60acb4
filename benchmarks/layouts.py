"""What each layout of InternLM-7B holds and sends on 1,024 GPUs: python -m benchmarks.layouts

Prints the table of docs/parallel.md from dry runs, and draws docs/parallel.svg. Takes minutes, and no GPU.
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
PICTURE = Path("docs/parallel.svg")


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
    """Return the bytes of collectives within a node, and of those between nodes."""
    items = [item for phase in profile.phases for item in phase.collectives]
    leaves = [len({rank // NODE for rank in item.ranks}) > 1 for item in items]
    within = sum(item.n_bytes for item, away in zip(items, leaves, strict=True) if not away)
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


def draw(profiles: dict[str, StepProfile]) -> str:
    """Draw memory by kind, and bytes inside and between nodes, a row a layout."""
    left, wide, high, gap = 190, 380, 22, 34
    most_memory = max(found.peak_bytes for found in profiles.values())
    most_sent = max(sum(sent(found)) for found in profiles.values())
    right = left + wide + 60
    height = 70 + gap * len(profiles) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{right + wide + 90}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="20" font-size="14">memory of a GPU at its peak, GiB</text>',
        f'<text x="{right}" y="20" font-size="14">bytes of a step\'s collectives on a GPU, GB</text>',
    ]
    legend = [(left, kind, color) for kind, color in KINDS.items()]
    for i, (x, kind, color) in enumerate(legend):
        parts += _label(x + 92 * i - 40, 36, kind, color)
    parts += _label(right + 200, 36, "inside a node", "#72b7b2") + _label(right + 310, 36, "between nodes", "#e45756")
    for i, (name, found) in enumerate(profiles.items()):
        y = 60 + gap * i
        parts.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{name}</text>')
        bars = [(found.bytes_at_peak[kind], color) for kind, color in KINDS.items()]
        parts += _bar(left, y, wide / most_memory, high, bars, f"{found.peak_bytes / GIB:.0f}")
        within, between = sent(found)
        bars = [(within, "#72b7b2"), (between, "#e45756")]
        parts += _bar(right, y, wide / most_sent, high, bars, f"{(within + between) / 1e9:.1f}")
    parts.append(
        f'<text x="{left}" y="{height - 14}" fill="#555">InternLM-7B on {WORLD_SIZE:,} GPUs in nodes of {NODE}, 4 '
        "micro-batches of 4,096 tokens, read by dry runs: python -m benchmarks.layouts</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bar(x: float, y: int, scale: float, high: int, pieces: list[tuple[int, str]], text: str) -> list[str]:
    parts = []
    for size, color in pieces:
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="{size * scale:.1f}" height="{high}" fill="{color}"/>')
        x += size * scale
    return [*parts, f'<text x="{x + 5:.1f}" y="{y + 15}">{text}</text>']


def _label(x: float, y: int, text: str, color: str) -> list[str]:
    return [
        f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{color}"/>',
        f'<text x="{x + 13}" y="{y}" font-size="11">{text}</text>',
    ]


def main() -> None:
    register()
    profiles = {}
    for name, overrides in LAYOUTS.items():
        profiles[name] = profile(overrides)
        print(f"{name}: {profiles[name].collectives}", flush=True)
    print(*rows(profiles), sep="\n")
    PICTURE.write_text(draw(profiles), encoding="utf-8")


if __name__ == "__main__":
    main()
