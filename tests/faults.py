"""Runs of two ranks over which something comes at some moment."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conf.schema import to_config
from launch.config import LauncherConfig, Where
from launch.environment import VARIABLES
from launch.ranks import launch
from tests.conftest import composed_cfg

MOMENTS = {  # what of a rank is interrupted
    "step": "training.state:TrainState.take_batch",
    "validation": "data.dataset:PackedDataset.batch",  # the second time: data.workers=1 leaves the others elsewhere
    "save": "training.resume:RunCheckpoints.save",
    "write": "training.checkpoint._describe",  # of its files, the rank hashes each
    "fill": "training.scoring.fill",  # a batch of tasks or samples
    "encode": "data.tokenizer:SentencePieceTokenizer.encode",
    "choose": "torch.multinomial",  # a token of a sample
}


TWO = ["parallel=ddp", "parallel.nproc_per_node=2", "parallel.threads=1"]


def configured(folder: Path, *settings: str) -> Any:
    """Return the configuration of a run in `folder`, which is made."""
    config = to_config(composed_cfg(*settings, f"name={folder.name}"))
    folder.mkdir(exist_ok=True)
    return config


def disturbed(folder: Path, fault: str, settings: list[str], *, moment: str = "step", rank: int = 1, n: int = 4) -> Any:
    """Train on two ranks in `folder`; a fault, a function of this module, comes over one at a moment's n-th time."""
    config = configured(folder, *TWO, *settings)
    return launch(work, config, folder, fault, moment, rank, n, config=config.parallel)


def work(config: Any, run_dir: Path, fault: str, moment: str, rank: int, n: int) -> float | None:
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


def slurm_task(rank: int, config: Any, folder: Path, jobs: Path, port: int, *fault: Any) -> None:
    """Be a rank, a task of srun in a job that requeues crashes; Slurm is a file with the ranks that ask it to."""
    from submitit.core.utils import JobPaths

    from launch import slurm
    from launch.jobs import Job

    def requeue(_most: int) -> str:
        (jobs / f"requeued{rank}").touch()
        return ""

    slurm.requeue = requeue
    os.environ |= dict(zip(VARIABLES, (str(rank), "2", str(rank), "2", "127.0.0.1", str(port)), strict=True))
    launcher = LauncherConfig(where=Where.slurm, requeue_crashes=True)
    job = Job("tests.faults:work", (config, folder, *fault), folder, config.parallel, launcher)
    job(JobPaths(jobs, job_id="7", task_id=rank))


def _signals(*signums: int) -> Callable[[], None]:
    def send() -> None:
        for signum in signums:
            os.kill(os.getpid(), signum)

    return send


kill = _signals(signal.SIGKILL)
stop = _signals(signal.SIGSTOP)
terminate = _signals(signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM)


def fail() -> None:
    raise ValueError("boom")


def hang() -> float:
    time.sleep(3600)
    return 1.0


def spin() -> None:
    """Have the GPU busy for an hour."""
    torch.cuda._sleep(10**13)


def drag() -> None:
    """Have each further batch take a while to load."""
    from data.dataset import PackedDataset

    read = PackedDataset.batch

    def late(self: PackedDataset, packs: Any) -> Any:
        time.sleep(0.2)
        return read(self, packs)

    PackedDataset.batch = late


def _in_next_pass(act: Callable[..., Any]) -> Callable[[], None]:
    """Return a fault in this rank's next micro-batch; `act` returns the factor of its loss."""

    def plan() -> None:
        from parallel.engine import Engine

        run_one = Engine._run_one

        def once(self: Engine, batch: Any, weight: Any, sums: Any, position: Any) -> None:
            Engine._run_one = run_one
            run_one(self, batch, weight * act(self), sums, position)

        Engine._run_one = once

    return plan


def _flip_sign(engine: Any) -> float:
    """Flip the sign of a weight of this rank's replica."""
    with torch.no_grad():
        engine.params["norm.weight"].shard[3].neg_()
    return 1.0


poison = _in_next_pass(lambda _: float("nan"))
flip = _in_next_pass(_flip_sign)
hang_in_pass = _in_next_pass(lambda _: hang())


def stop_and_save_slowly() -> None:
    """Have the run stopped as a terminal does, and this rank's part of the save take a while."""
    import training.checkpoint

    describe = training.checkpoint._describe

    def slow(*args: Any, **settings: Any) -> Any:
        time.sleep(3)
        return describe(*args, **settings)

    training.checkpoint._describe = slow
    os.kill(os.getppid(), signal.SIGTERM)


def disagree() -> None:
    """Wait in a collective that no other rank is in."""
    dist.broadcast(torch.zeros(5), src=0)
