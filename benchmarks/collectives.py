"""Bus bandwidth of collectives over all ranks: torchrun --nproc-per-node 8 -m benchmarks.collectives"""

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from benchmarks.timing import synchronize
from parallel.config import ParallelConfig
from parallel.mesh import distributed

SIZES_MIB = (1, 16, 128, 1024)


def measure(*, scale: int = 1, times: int = 20) -> dict[str, float]:
    """Return GB/s by collective and MiB of the full tensor; `scale` divides the sizes."""
    found: dict[str, float] = {}
    with distributed(ParallelConfig(dp_replicate=-1, step_timeout_s=120)) as mesh:
        n = mesh.world_size
        for mib in SIZES_MIB:
            full = torch.zeros(mib * 2**19 // scale, dtype=torch.bfloat16, device=mesh.device)
            part = torch.zeros_like(full[: len(full) // n])
            calls: dict[str, Callable[[], object]] = {
                "all_reduce": partial(dist.all_reduce, full),
                "all_gather": partial(dist.all_gather_into_tensor, full, part),
                "reduce_scatter": partial(dist.reduce_scatter_tensor, part, full),
            }
            for name, call in calls.items():
                for count in (2, times):  # the first is warm-up
                    synchronize(mesh.device)
                    begin = time.perf_counter()
                    for _ in range(count):
                        call()
                    synchronize(mesh.device)
                moved = full.nbytes * (n - 1) / n * (2 if name == "all_reduce" else 1)
                found[f"{name} {mib}"] = moved * times / (time.perf_counter() - begin) / 1e9
    return found


if __name__ == "__main__":
    print("\n".join(f"{name} MiB: {rate:.1f} GB/s" for name, rate in measure().items()))
