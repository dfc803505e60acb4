"""Runs of two ranks over which something comes at some moment."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conf.schema import to_config
from launch.ranks import launch
from tests.conftest import composed_cfg

MOMENTS = {  # what of a rank is interrupted
    "step": "training.state:TrainState.take_batch",
    "validation": "data.dataset:PackedDataset.batch",  # the second time: data.workers=1 leaves the others elsewhere
    "save": "training.resume:RunCheckpoints.save",
}


def disturbed(folder: Path, fault: str, settings: list[str], *, moment: str = "step", rank: int = 1, n: int = 4) -> Any:
    """Train on two ranks in `folder`; a fault, a function of this module, comes over one at a moment's n-th time."""
    two = ["parallel=ddp", "parallel.nproc_per_node=2", "parallel.threads=1", f"name={folder.name}"]
    config = to_config(composed_cfg(*settings, *two))
    folder.mkdir(exist_ok=True)
    return launch(_work, config, folder, fault, moment, rank, n, config=config.parallel)


def _work(config: Any, run_dir: Path, fault: str, moment: str, rank: int, n: int) -> float | None:
    import pkgutil

    import train

    owner, _, name = MOMENTS[moment].rpartition(".")
    place, act, times = pkgutil.resolve_name(owner), globals()[fault], iter(range(1, 10**6))
    whole = getattr(place, name)

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if int(os.environ["RANK"]) == rank and next(times) == n:
            act()
        return whole(self, *args, **kwargs)

    setattr(place, name, interrupted)
    return train.work(config, run_dir)


def _signals(*signums: int) -> Callable[[], None]:
    def send() -> None:
        for signum in signums:
            os.kill(os.getpid(), signum)

    return send


kill = _signals(signal.SIGKILL)
terminate = _signals(signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM)


def fail() -> None:
    raise ValueError("boom")


def disagree() -> None:
    """Wait in a collective that no other rank is in."""
    dist.broadcast(torch.zeros(5), src=0)
