"""Requests to stop: signals only set a flag, on which all ranks agree between steps."""

import os
import signal
from contextlib import suppress
from types import FrameType

from launch.ranks import SIGNALS, handle
from parallel.mesh import Mesh

GIVEN_UP = 1000  # beyond every signal
MESSAGE = b"\nstopping after this step and saving; once more to stop at once\n"


class StopRequest:
    """A context in which signals ask for a stop instead of ending the process.

    SIGTERM is what Slurm sends before it takes a node away, SIGUSR2 what comes before the time limit, SIGHUP what a
    terminal sends that is closed. A second SIGINT raises KeyboardInterrupt. Processes forked inside the context ignore
    them all.
    The ranks of a mesh agree on it; without one, this process is alone.
    """

    def __init__(self, mesh: Mesh | None = None) -> None:
        self.signum: int | None = None
        self.agreed: int | None = None
        self.mesh = mesh if mesh is not None and mesh.world_size > 1 else None
        self.pid = os.getpid()

    def __enter__(self) -> "StopRequest":
        self.before = handle(SIGNALS, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def __bool__(self) -> bool:
        return (self.signum if self.mesh is None else self.agreed) is not None

    def agree(self) -> None:
        """Let all ranks know of a request to any of them; all must call this at the same step."""
        if self.mesh is not None:
            self.agreed = self.mesh.all_reduce_max(self.signum or 0) or None
            self.signum = self.agreed or self.signum

    def give_up(self) -> None:
        """Ask for the end of a run that is not worth its steps."""
        self.signum = GIVEN_UP

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
        self.signum = signum
        if os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # the terminal is gone
                os.write(2, MESSAGE)  # print is not safe inside a handler
