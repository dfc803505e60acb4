"""What a dry run assumes about the machine. Torch-free."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class DryRunConfig:
    """A step on ranks and GPUs that are not there, and the machine it is timed for (defaults: H100 or H200, NVLink,
    one 400 Gb/s card a GPU).

    Rates are what a kernel or a link reaches by its data sheet, in one direction; `*_efficiency` and `overlap`
    are shares of it.
    """

    enabled: bool = False
    world_size: int = 1
    devices_per_node: int = 8
    device_memory_gib: float = 139.0
    peak_tflops: float = 989.0
    flops_efficiency: float = 0.75  # of matrix products
    memory_gbps: float = 3350.0  # GB/s
    memory_efficiency: float = 0.8  # of everything that is no product
    intra_node_gbps: float = 360.0  # GB/s of a GPU to the others of its node
    inter_node_gbps: float = 45.0  # GB/s of a GPU to other nodes
    intra_node_latency_us: float = 1.0  # of a hop of a ring
    inter_node_latency_us: float = 6.0
    launch_us: float = 20.0  # of a collective
    overlap: float = 0.9  # share of computing behind which FSDP's collectives fit
    workspace_mib: int = 64  # that the libraries of products keep

    def problems(self) -> Iterator[str]:
        for key in ("world_size", "devices_per_node"):
            if getattr(self, key) < 1:
                yield f"dry_run.{key} ({getattr(self, key)}) must be at least 1"
        for key in ("peak_tflops", "memory_gbps", "intra_node_gbps", "inter_node_gbps", "device_memory_gib"):
            if not getattr(self, key) > 0:
                yield f"dry_run.{key} ({getattr(self, key)}) must be positive"
        for key in ("flops_efficiency", "memory_efficiency"):
            if not 0 < getattr(self, key) <= 1:
                yield f"dry_run.{key} ({getattr(self, key)}) must be in (0, 1]"
        if not 0 <= self.overlap <= 1:
            yield f"dry_run.overlap ({self.overlap}) must be in [0, 1]"
        for key in ("intra_node_latency_us", "inter_node_latency_us", "launch_us", "workspace_mib"):
            if getattr(self, key) < 0:
                yield f"dry_run.{key} ({getattr(self, key)}) must be 0 or more"
