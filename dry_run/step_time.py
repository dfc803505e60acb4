"""Estimated time of a step, from a rank's operations and the machine in `DryRunConfig`.

The time of a collective is a launch, a latency per hop of the ring, and its bytes over the slowest link
(Hockney's alpha-beta model with the ring algorithms of Thakur et al. 2005, doi:10.1177/1094342005051521).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from dry_run.config import DryRunConfig
from dry_run.trace import Collective, Phase


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step by cause."""

    compute_s: float
    blocking_s: float  # collectives that do not overlap
    exposed_s: float  # data-parallel collectives beyond what compute hides
    update_s: float  # the optimizer's part of compute_s and blocking_s
    bubble_s: float = 0.0  # pipeline bubble

    @property
    def total_s(self) -> float:
        return self.compute_s + self.blocking_s + self.exposed_s + self.bubble_s


def estimate_time(phases: Iterable[Phase], config: DryRunConfig, *, async_tp: bool = False) -> StepTime:
    """Estimate a step without the pipeline bubble; `phases` have the messages of synchronous tensor parallelism."""
    compute = blocking = exposed = update = 0.0
    for phase in phases:
        busy = compute_s(phase, config)
        overlapping, blocked = 0.0, blocking
        for item in phase.collectives:
            if item.overlaps:
                overlapping += collective_s(item, config)
            else:
                hidden = async_tp and item.axis == "tp" and item.kind in ("all_gather", "reduce_scatter")
                blocking += collective_s(item, config) * (1 - config.async_tp_overlap * hidden)
        compute += busy
        exposed += max(0.0, overlapping - busy * config.overlap)
        update += (busy + blocking - blocked) * phase.update
    return StepTime(compute, blocking, exposed, update)


def compute_s(phase: Phase, config: DryRunConfig) -> float:
    products = phase.flops - phase.attention_flops - phase.fp8_flops
    bf16_s = products / config.flops_efficiency + phase.attention_flops / config.attention_efficiency
    fp8_s = phase.fp8_flops / config.fp8_efficiency / (config.fp8_tflops * 1e12)
    memory_s = phase.n_bytes / (config.memory_gbps * 1e9 * config.memory_efficiency)
    return bf16_s / (config.peak_tflops * 1e12) + fp8_s + memory_s


def collective_s(item: Collective, config: DryRunConfig) -> float:
    n_ranks = len(item.ranks)
    n_nodes = len({rank // config.devices_per_node for rank in item.ranks})
    hops = 1 if item.kind in ("send", "recv") else n_ranks - 1
    # Fraction of the bytes that passes over a link
    share = 1.0 if item.kind in ("send", "recv", "broadcast") else (n_ranks - 1) / n_ranks
    far = min(hops, n_nodes) if n_nodes > 1 else 0  # hops between nodes
    latency_us = far * config.inter_node_latency_us + (hops - far) * config.intra_node_latency_us
    gbps = config.intra_node_gbps
    if n_nodes > 1:  # the ranks of a node share its network cards
        gbps = min(gbps, config.inter_node_gbps * n_ranks / n_nodes)
    pass_s = latency_us * 1e-6 + share * item.n_bytes / (gbps * 1e9)
    return config.launch_us * 1e-6 + (2 if item.kind == "all_reduce" else 1) * pass_s
