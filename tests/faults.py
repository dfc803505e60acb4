"""Runs of several ranks that something disturbs, and what each rank does then."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir

from conf.cli import CONF, is_user_error
from conf.schema import register, to_config
from launch.ranks import launch

TWO = ["parallel=ddp", "parallel.nproc_per_node=2", "parallel.threads=1"]


def disturbed(folder: Path, fault: str, settings: list[str], *, step: int = 3, rank: int = 1) -> Any:
    """Train on two ranks in `folder`; after `step` steps a fault, a function of this module, comes over `rank`."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = to_config(compose("train", overrides=[*settings, *TWO, f"name={folder.name}"]))
    folder.mkdir(exist_ok=True)
    return launch(work, config, folder, fault, step, rank, config=config.parallel, is_user_error=is_user_error)


def work(config: Any, run_dir: Path, fault: str, step: int, rank: int) -> float | None:
    import train
    from training.state import TrainState

    take, act = TrainState.take_batch, globals()[fault]

    def take_batch(self: TrainState, **counts: int) -> None:
        if self.step == step and int(os.environ["RANK"]) == rank:
            act()
        take(self, **counts)

    TrainState.take_batch = take_batch
    return train.work(config, run_dir)


def on_signal(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


kill, stop, terminate = on_signal(signal.SIGKILL), on_signal(signal.SIGSTOP), on_signal(signal.SIGTERM)
stacks = on_signal(signal.SIGUSR1)


def fail() -> None:
    raise ValueError("boom")


def hang() -> None:
    time.sleep(300)


def disagree() -> None:
    """Wait in a collective that no other rank is in."""
    dist.broadcast(torch.zeros(5), src=0)
