"""Being asked to stop: signals only set a flag, which the loop reads between steps."""

import os
import signal
from types import FrameType

MESSAGE = b"\nstopping after this step and saving; once more to stop at once\n"


class StopRequest:
    """A context in which SIGINT and SIGTERM ask for a stop instead of ending the process.

    A second SIGINT raises KeyboardInterrupt. Processes forked inside the context ignore both.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum: int | None = None
        self.pid = os.getpid()

    def __enter__(self) -> "StopRequest":
        self.before = {signum: signal.signal(signum, self._handle) for signum in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def __bool__(self) -> bool:
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        """The code a shell expects of a process that a signal ended."""
        return 128 + (self.signum or 0)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if os.getpid() != self.pid:
            return
        if signum == signal.SIGINT and self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        if os.environ.get("RANK", "0") == "0":
            os.write(2, MESSAGE)  # print is not safe inside a handler
