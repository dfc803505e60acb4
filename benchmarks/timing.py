"""Timing on a device, for the benchmarks."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from launch.environment import free_port


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(work: Callable[[], object], device: torch.device, *, seconds: float = 1.0) -> float:
    """Return the median time per call, after two warm-up calls."""
    for _ in range(2):
        work()
    synchronize(device)
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def product_tflops(device: torch.device, *, size: int = 8192, seconds: float = 2.0) -> float:
    """Return the sustained rate of a large bf16 matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_ms(lambda: [a @ b for _ in range(10)], device, seconds=seconds) * 10 / 1e9


def copy_tbps(device: torch.device) -> float:
    """Return the bandwidth of a large copy, bytes read plus written, in TB/s."""
    source = torch.randn(1 << 29, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source), device) / 1e9


def start_ranks(module: str, *, restarts: int = 0) -> int:
    """Run this command on a rank per GPU, or on two ranks on a CPU; return the exit code."""
    if (n := torch.cuda.device_count() if torch.cuda.is_available() else 2) < 2:
        raise SystemExit("this needs two GPUs or more; for one: python -m benchmarks.train_step")
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--max-restarts={restarts}", f"--nproc-per-node={n}"]
    address = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    return subprocess.run([*torchrun, *address, "-m", module, *sys.argv[1:]]).returncode


def where(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"
