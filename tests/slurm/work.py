"""What runs in the jobs of these tests."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.slurm import requeue_slurm_job
from training.stop import StopRequest

RESTARTS = "SLURM_RESTART_COUNT"


def end(how: str) -> Any:
    """End on one rank in some way while the other waits for it, as in a collective."""
    rank, attempt = int(os.environ["RANK"]), os.environ.get(RESTARTS, "0")
    begun = Path(os.environ["SUBMITIT_FOLDER"]) / f"begun-{os.environ['SLURM_JOB_ID']}-{attempt}"  # the other has
    if rank == 0:
        print(f"attempt {attempt}", flush=True)
    if how == "answer":
        names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "SLURM_JOB_NUM_NODES", "FROM_SETUP", "FROM_SRUN")
        return [os.environ[name] for name in names]
    if rank != (0 if how == "hang" else 1):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Slurm need not wait before it kills
        begun.touch()
        time.sleep(600)
    while not begun.exists():
        time.sleep(0.1)
    if how == "crash":
        raise ValueError("boom")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("timed out waiting for the others")


def wait_for_cancel(run_dir: Path) -> None:
    """Save when asked to stop and ask for a requeue, as a run does."""
    with StopRequest() as stop:
        (run_dir / f"begun{os.environ.get(RESTARTS, '0')}").touch()
        while not stop:
            stop.agree(0)
            time.sleep(0.05)
    (run_dir / "saved").touch()
    requeue_slurm_job(run_dir, rank=0, max_requeues=1)
    sys.exit(stop.exit_code)


def train_slowly_at_first(config: Any, run_dir: Path, after_step: int = 0) -> float | None:
    """Train; in the first attempt a step after `after_step` takes so long that something comes between."""
    return _train(config, run_dir, slow=lambda attempt, step: attempt == 0 and step >= after_step)


def train_and_crash(config: Any, run_dir: Path) -> float | None:
    """Train and crash in the second step of the first attempt, and in the third of every later one."""
    return _train(config, run_dir, crash=lambda attempt, step: step == 1 + (attempt > 0))


def _train(
    config: Any,
    run_dir: Path,
    slow: Callable[[int, int], bool] = lambda _attempt, _step: False,
    crash: Callable[[int, int], bool] = lambda _attempt, _step: False,
) -> float | None:
    """Train, with a step that is slow or crashes where these say so of an attempt and the steps behind it."""
    from train import work
    from training.state import TrainState

    attempt, take = int(os.environ.get(RESTARTS, "0")), TrainState.take_batch

    def disturbed(self: TrainState, **counts: int) -> None:
        if crash(attempt, self.step):
            raise ValueError("boom")
        if slow(attempt, self.step):
            time.sleep(4)
        take(self, **counts)

    TrainState.take_batch = disturbed
    with (run_dir / "attempts").open("a") as file:
        file.write(f"{attempt}\n")
    return work(config, run_dir)
