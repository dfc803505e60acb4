"""The devices of a run: opened before anything else and closed after it, once for every sweep point."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from parallel.config import Device, ParallelConfig, ParallelError


@dataclass(frozen=True, slots=True)
class Mesh:
    """Where this process stands. Every axis exists at size 1."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1

    @property
    def maximum(self) -> Callable[[int], int] | None:
        """The largest of all ranks' values; None for a rank alone."""
        return None


@contextmanager
def distributed(config: ParallelConfig) -> Iterator[Mesh]:
    """Open the mesh a layout asks for and close it again; raises `ParallelError` if it cannot be."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise ParallelError(
            f"WORLD_SIZE ({world_size}) processes were started for parallel=single, which is one device; "
            "start one process, as in: python train.py"
        )
    if config.device is Device.cuda and not torch.cuda.is_available():
        raise ParallelError("parallel.device (cuda): torch sees no CUDA device here; use parallel.device=cpu")
    on_cuda = config.device is not Device.cpu and torch.cuda.is_available()
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    try:
        yield Mesh(device=torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)
