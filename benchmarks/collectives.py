"""Bus bandwidth of collectives over all ranks: torchrun --nproc-per-node 8 -m benchmarks.collectives"""

import os
import time
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.timing import synchronize
from parallel.config import ParallelConfig
from parallel.mesh import distributed

SIZES_MIB = (1, 16, 128, 1024)


def measure(n: int, *, scale: int = 1, times: int = 20) -> dict[str, float]:
    """Return GB/s by collective and MiB of the full tensor, in groups of `n` neighbours that all send at once.

    `scale` divides the sizes.
    """
    found: dict[str, float] = {}
    with distributed(ParallelConfig(dp_replicate=-1, tp=n, step_timeout_s=120)) as mesh:
        group = None if mesh.batch_mesh is None else mesh.batch_mesh.get_group("tp")
        for mib in SIZES_MIB:
            full = torch.zeros(mib * 2**19 // scale, dtype=torch.bfloat16, device=mesh.device)
            part = torch.zeros_like(full[: len(full) // n])
            calls: dict[str, Callable[[], object]] = {
                "all_reduce": partial(dist.all_reduce, full, group=group),
                "all_gather": partial(dist.all_gather_into_tensor, full, part, group=group),
                "reduce_scatter": partial(dist.reduce_scatter_tensor, part, full, group=group),
            }
            for name, call in calls.items():
                for count in (2, times):  # the first is warm-up
                    synchronize(mesh.device)
                    begin = time.perf_counter()
                    for _ in range(count):
                        call()
                    synchronize(mesh.device)
                found[f"{name} {mib}"] = moved(name, n, full.nbytes) * times / (time.perf_counter() - begin) / 1e9
    return found


def moved(kind: str, n: int, n_bytes: float) -> float:
    """Return the bytes that each of n ranks sends for a full tensor of `n_bytes`."""
    return n_bytes * (n - 1) / n * (2 if kind == "all_reduce" else 1)


def seconds(rates: Mapping[str, float], kind: str, n: int, count: int, n_bytes: int) -> float:
    """Return the least time of `count` collectives with `n_bytes` in all, at rates that `measure` found."""
    kind = kind if f"{kind} {SIZES_MIB[0]}" in rates else "all_gather"  # the other kinds are one pass too
    gbps = [rates[f"{kind} {mib}"] for mib in SIZES_MIB]
    rate = np.interp(np.log2(n_bytes / count / 2**20), np.log2(SIZES_MIB), gbps)
    return moved(kind, n, n_bytes) / (float(rate) * 1e9)


if __name__ == "__main__":
    print("\n".join(f"{name} MiB: {rate:.1f} GB/s" for name, rate in measure(int(os.environ["WORLD_SIZE"])).items()))
