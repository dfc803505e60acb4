"""The machine that a dry run simulates. Torch-free."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from launch.config import unless


@dataclass(kw_only=True, slots=True)
class DryRunConfig:
    """The simulated ranks and hardware (defaults: H100 or H200, NVLink, 400 Gb/s per GPU between nodes).

    Rates are peaks from data sheets, in one direction; `*_efficiency` and `*overlap` are the fractions reached.
    """

    enabled: bool = False
    world_size: int = 1
    devices_per_node: int = 8
    device_memory_gib: float = 139.0
    peak_tflops: float = 989.0
    flops_efficiency: float = 0.70  # of matrix products
    attention_efficiency: float = 0.55
    fp8_tflops: float = 1979.0
    fp8_efficiency: float = 0.57  # of matrix products in 8 bits
    memory_gbps: float = 3350.0  # GB/s
    memory_efficiency: float = 0.8  # of all other operations
    intra_node_gbps: float = 280.0  # GB/s per GPU
    inter_node_gbps: float = 45.0  # GB/s per GPU
    intra_node_latency_us: float = 1.0  # per hop of a ring
    inter_node_latency_us: float = 6.0
    launch_us: float = 40.0  # fixed cost per collective
    overlap: float = 0.9  # fraction of compute time that can hide data-parallel collectives
    async_tp_overlap: float = 0.45  # fraction of parallel.async_tp's messages that is hidden
    workspace_mib: int = 64  # of cuBLAS

    def problems(self) -> Iterator[str]:
        yield from unless(self, "dry_run", "at least 1", lambda x: x >= 1, "world_size", "devices_per_node")
        shares = [f.name for f in fields(self) if f.name.endswith(("_efficiency", "overlap"))]
        yield from unless(self, "dry_run", "from 0 to 1", lambda x: 0 <= x <= 1, *shares)
