"""Requests to stop: signals only set a flag, on which all ranks agree between steps and batches."""

import logging
import os
import signal
import time
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from launch.ranks import SIGNALS, handle
from parallel.mesh import Mesh

GIVEN_UP = 1000  # beyond every signal
MESSAGE = b"\nstopping after this step and saving; once more to stop at once\n"

logger = logging.getLogger(__name__)


class StopRequest:
    """A context in which signals ask for a stop instead of ending the process; the ranks of a mesh agree on it.

    SIGTERM is what Slurm sends before it takes a node away, SIGUSR2 what comes before the time limit, SIGHUP what a
    terminal sends that is closed. A second SIGINT raises KeyboardInterrupt; other signals are counted. Processes forked
    inside the context ignore them all.
    """

    def __init__(self, mesh: Mesh | None = None) -> None:
        self.signum: int | None = None
        self.mesh = mesh if mesh is not None and mesh.world_size > 1 else None
        self.asked: dict[str, Any] = {}  # which signal came first, to which rank, when, and what followed
        self.received = self.agreements = 0
        self.saved_step = 0  # of the checkpoint that the run leaves
        self.pid = os.getpid()

    def __enter__(self) -> "StopRequest":
        self.before = handle(SIGNALS, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def __bool__(self) -> bool:
        return bool(self.asked)

    def agree(self, step: int, own_s: float = 0.0) -> list[float]:
        """Let all ranks know of a request to any of them; return `own_s` of all. All must call this alike."""
        self.agreements += 1
        figures = torch.tensor([[self.signum or 0.0, own_s]], dtype=torch.float64)
        if self.mesh is not None:
            mine, figures = figures, figures.new_zeros(self.mesh.world_size, 2)
            figures[self.mesh.rank] = mine
            dist.all_reduce(figures, group=self.mesh.host)
        signum, rank = (int(found) for found in figures[:, 0].max(dim=0))
        if signum and not self.asked:
            self.signum = signum
            name = signal.Signals(signum).name if signum != GIVEN_UP else "early_stop"
            self.asked = {"signal": name, "rank": rank, "step": step, "time": time.time()}
            logger.info("%s on rank %d, seen at step %d: the run saves and stops", name, rank, step)
        return figures[:, 1].tolist()

    def give_up(self) -> None:
        """Ask for the end of a run that is not worth its steps."""
        self.signum = GIVEN_UP

    def summary(self) -> dict[str, Any]:
        """Return what status.json keeps of a signal and what followed; {} if there was none."""
        if not self or self.given_up:
            return {}
        saved = f"saved at step {self.saved_step}" if self.saved_step else "nothing was saved"
        reason = f"{self.asked['signal']} on rank {self.asked['rank']}, {saved}"
        return {"stop": {**self.asked, "signals": self.received, "exit_code": self.exit_code}, "reason": reason}

    @property
    def given_up(self) -> bool:
        return bool(self) and self.signum == GIVEN_UP

    @property
    def for_a_requeue(self) -> bool:
        """Whether Slurm sent the signal to a job that is to go on later."""
        return bool(self) and self.signum in (signal.SIGTERM, signal.SIGUSR2)

    @property
    def exit_code(self) -> int:
        """The code that a shell expects of a process ended by a signal."""
        return 128 + (self.signum or 0)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if os.getpid() != self.pid:
            return
        if signum == signal.SIGINT and self.signum is not None:
            raise KeyboardInterrupt
        self.received += 1
        self.signum = self.signum or signum
        if os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # the terminal is gone
                os.write(2, MESSAGE)  # print is not safe inside a handler
