"""How long a step takes, from what a rank issues and what the machine can do. A model, with its inputs in the config.

A collective takes a launch, a latency for each hop of a ring, and its bytes over the slowest link
(Hockney's alpha-beta model; the ring algorithms as in Thakur et al. 2005, doi:10.1177/1094342005051521).
"""

from dataclasses import dataclass, replace

from dry_run.config import DryRunConfig
from dry_run.trace import Collective, Window, ranks_of

# Bytes over a link by the bytes of the tensor, and passes around the ring, for n ranks
PASSES = {"all_reduce": 2}
# Parameters and gradients, which FSDP sends beside the products
KINDS = ("all_gather", "reduce_scatter", "all_reduce")
BESIDE = {"dp_replicate", "dp_shard", "cp"}


def collective_s(item: Collective, config: DryRunConfig) -> float:
    """Seconds of one collective on its own."""
    n_ranks = len(item.ranks)
    n_nodes = len({rank // config.devices_per_node for rank in item.ranks})
    if item.kind in ("send", "recv"):
        hops, share = 1, 1.0
    else:
        hops, share = n_ranks - 1, (n_ranks - 1) / n_ranks
        if item.kind == "broadcast":
            share = 1.0
    between = min(hops, n_nodes if n_nodes > 1 else 0)
    latency_us = between * config.inter_node_latency_us + (hops - between) * config.intra_node_latency_us
    gbps = config.intra_node_gbps
    if n_nodes > 1:
        # Ranks of one node that share a group use all of their network cards for it.
        gbps = min(gbps, config.inter_node_gbps * n_ranks / n_nodes)
    once = latency_us * 1e-6 + share * item.n_bytes / (gbps * 1e9)
    return config.launch_us * 1e-6 + PASSES.get(item.kind, 1) * once


def compute_s(window: Window, config: DryRunConfig) -> float:
    """Seconds of a window's products and other operations."""
    products = window.flops / (config.peak_tflops * 1e12 * config.flops_efficiency)
    return products + window.n_bytes / (config.memory_gbps * 1e9 * config.memory_efficiency)


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step by what they are spent on."""

    compute_s: float
    waiting_s: float  # for collectives that nothing hides
    exposed_s: float  # of those that computing hides in part
    bubble_s: float = 0.0  # in which a pipeline's rank has no micro-batch

    @property
    def total_s(self) -> float:
        return self.compute_s + self.waiting_s + self.exposed_s + self.bubble_s

    def with_bubble(self, share: float) -> "StepTime":
        """Add what a pipeline's rank idles, as a share of its busy time."""
        return replace(self, bubble_s=share * (self.compute_s + self.waiting_s))


def regrouped(windows: list[Window], axes: dict[str, int]) -> list[Window]:
    """Give the windows of rank 0 on a mesh of other sizes: what is sent stays as it is, between other ranks."""
    return [
        replace(
            window,
            collectives=[replace(item, ranks=ranks_of(item.axis, axes)) for item in window.collectives],
        )
        for window in windows
    ]


def step_time(windows: list[Window], config: DryRunConfig) -> StepTime:
    """Estimate a step of a rank that never idles."""
    computing = waiting = exposed = 0.0
    for window in windows:
        busy = compute_s(window, config)
        beside = [item for item in window.collectives if item.kind in KINDS and set(item.axis.split("+")) <= BESIDE]
        behind = [item for item in window.collectives if item not in beside]
        hidden = sum(collective_s(item, config) for item in beside)
        computing += busy
        waiting += sum(collective_s(item, config) for item in behind)
        exposed += max(0.0, hidden - busy * config.overlap)
    return StepTime(computing, waiting, exposed)
