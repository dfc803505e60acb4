"""What ranks do in the tests of launching, and a command that launches it as train.py does its runs."""

import os
import signal
import sys
import time
from pathlib import Path

from conf.cli import report_user_errors
from corpus.config import DataError
from launch.environment import DEFAULTS, VARIABLES
from launch.ranks import launch
from parallel.config import ParallelConfig
from training.stop import StopRequest


def variables() -> dict[str, str]:
    return {name: os.environ[name] for name in (*VARIABLES, *DEFAULTS)}


def fail(which: int, how: str) -> str:
    """One rank fails in some way while the others wait for it, as in a collective."""
    if int(os.environ["RANK"]) != which:
        if how == "hang":
            time.sleep(1)
            raise RuntimeError("rank 0 timed out waiting for its peers")
        time.sleep(60)
    if how == "raise":
        raise ValueError("boom")
    if how == "user error":
        raise DataError("there is no such corpus")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    return how


def steps(folder: Path) -> None:
    """Wait to be stopped, as the loop of a run does, and save."""
    rank = os.environ["RANK"]
    with StopRequest() as stop:
        (folder / f"started{rank}").write_text(str(os.getpid()))
        while not stop:
            stop.agree(0)
            time.sleep(0.01)
        time.sleep(0.2)
        (folder / f"saved{rank}").touch()
    sys.exit(stop.exit_code)


def launched(n: int, work, *args):
    return launch(work, *args, config=ParallelConfig(nproc_per_node=n))


if __name__ == "__main__":
    with report_user_errors():
        launched(2, steps, Path(sys.argv[1]))
