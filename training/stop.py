"""Stop requests: signals set a flag, on which all ranks agree between steps."""

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
MESSAGE = b"\nstopping after this step and saving; interrupt again to stop immediately\n"

logger = logging.getLogger(__name__)


class StopRequest:
    """A context manager in which signals request a stop instead of ending the process.

    Slurm sends SIGTERM on preemption and SIGUSR2 before the time limit; a closed terminal sends SIGHUP. A second
    SIGINT raises KeyboardInterrupt; other signals are counted. Processes forked inside the context ignore them all.
    """

    def __init__(self, mesh: Mesh | None = None) -> None:
        self.signum: int | None = None
        self.mesh = mesh if mesh is not None and mesh.world_size > 1 else None
        self.asked: dict[str, Any] = {}  # the first signal, its rank, step and time
        self.received = self.agreements = 0
        self.saved_step = 0  # of the run's last checkpoint
        self.pid = os.getpid()

    def __enter__(self) -> "StopRequest":
        self.before = handle(SIGNALS, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def __bool__(self) -> bool:
        return bool(self.asked)

    def agree(self, step: int, own_s: float = 0.0, *, failed: bool = False) -> tuple[list[float], bool]:
        """Share a request on any rank with all; return `own_s` of all ranks and whether any failed. A collective."""
        self.agreements += 1
        figures = torch.tensor([[self.signum or 0.0, own_s, failed]], dtype=torch.float64)
        if self.mesh is not None:
            mine, figures = figures, figures.new_zeros(self.mesh.world_size, 3)
            figures[self.mesh.rank] = mine
            dist.all_reduce(figures, group=self.mesh.host)
        signum, rank = (int(found) for found in figures[:, 0].max(dim=0))
        if signum and not self.asked:
            self.signum = signum
            name = signal.Signals(signum).name if signum != GIVEN_UP else "early_stop"
            self.asked = {"signal": name, "rank": rank, "step": step, "time": time.time()}
            logger.info("%s on rank %d, seen at step %d: the run saves and stops", name, rank, step)
        return figures[:, 1].tolist(), bool(figures[:, 2].any())

    def give_up(self) -> None:
        """Request the end of a run that early_stop judges hopeless."""
        self.signum = GIVEN_UP

    def summary(self) -> dict[str, Any]:
        """Return the entry for status.json; {} without a signal."""
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
        """Whether a Slurm job should be requeued after this signal."""
        return bool(self) and self.signum in (signal.SIGTERM, signal.SIGUSR2)

    @property
    def exit_code(self) -> int:
        """The shell's exit code for a process ended by a signal."""
        return 128 + (self.signum or 0)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if os.getpid() != self.pid:
            return
        if signum == signal.SIGINT and self.signum is not None:
            raise KeyboardInterrupt
        self.received += 1
        self.signum = self.signum or signum
        if os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # the terminal is closed
                os.write(2, MESSAGE)  # print is not reentrant
