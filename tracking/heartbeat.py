"""Signs of life: ranks that are stopped or late are named, with where they are, before a timeout ends the run."""

import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tracking.run_folder import write_atomically

FOLDER = ".ranks"  # in a run folder: a file per rank, and one more for each that holds up the others
CHECKS = 10  # in the time after which a rank is late
MISSED = 3  # checks after which a process that wrote nothing is taken for stopped
FRAMES = 12  # innermost ones of a stack that are shown
ROOT = f"{Path(__file__).parent.parent}/"

logger = logging.getLogger(__name__)
Sign = dict[str, Any]


class Heartbeat:
    """A thread that writes this rank's sign of life, and names the ranks of this machine that hold up the others.

    `progress()` changes as the run goes on; a rank where it did not for `late_s` is late. `pending()` is what the
    device waits for in other ranks, or "".
    """

    def __init__(
        self, run_dir: Path, rank: int, progress: Callable[[], int], *, late_s: float, pending: Callable[[], str]
    ) -> None:
        self.run_dir, self.rank, self.progress, self.pending, self.late_s = run_dir, rank, progress, pending, late_s
        first = rank - int(os.environ.get("LOCAL_RANK", "0"))
        self.here = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.reported: list[int] | None = None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        (self.run_dir / FOLDER).mkdir(exist_ok=True)
        late_file(self.run_dir, self.rank).unlink(missing_ok=True)
        self._write()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        sign_file(self.run_dir, self.rank).unlink(missing_ok=True)  # a process that is killed leaves it

    def _run(self) -> None:
        seen, since = self.progress(), time.monotonic()
        while not self.ended.wait(self.late_s / CHECKS):
            if (now := self.progress()) != seen:
                seen, since = now, time.monotonic()
            waited_s = time.monotonic() - since
            with suppress(OSError):  # a full disk, for instance
                self._write(**(self._where() if waited_s > self.late_s else {}))
                if waited_s > self.late_s and self.reported is None:
                    self._report(waited_s)
                elif waited_s < self.late_s:
                    for rank in self.reported or ():
                        late_file(self.run_dir, rank).unlink(missing_ok=True)
                    self.reported = None

    def _write(self, **where: str) -> None:
        sign = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time(), **where}
        write_atomically(sign_file(self.run_dir, self.rank), json.dumps(sign))

    def _where(self) -> Sign:
        """Return where the main thread is, and the collective that it or its device waits in, if any."""
        stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
        names = [frame.filename.removeprefix(ROOT) for frame in stack]
        ours = max(n for n, name in enumerate(names) if n == 0 or (name[0] != "/" and "site-packages" not in name))
        calls = [frame.name for frame in stack[ours + 1 :] if "torch/distributed" in frame.filename]
        at = f"{names[ours]}:{stack[ours].lineno} ({stack[ours].name})"
        waits = self.pending() or (f"{calls[-1]} at {at}" if calls else "")
        return {"at": at, "waits": waits, "stack": "".join(traceback.format_list(stack[-FRAMES:]))}

    def _report(self, waited_s: float) -> None:
        """Have the first rank of this machine name those that hold up the others, once all are late that can be."""
        signs = {rank: sign for rank in self.here if (sign := read_sign(self.run_dir, rank))}
        alive = {r: s for r, s in signs.items() if time.time() - s["time"] < MISSED * self.late_s / CHECKS}
        if self.rank != min(alive) or not all("at" in sign for sign in alive.values()):
            self.reported = None if self.rank == min(alive) else []
            return
        found = {rank: _state(sign) for rank, sign in signs.items() if rank not in alive}
        found |= {r: f"it hangs at {s['at']}\n{s['stack']}" for r, s in alive.items() if not s["waits"]}
        waits = sorted({sign["waits"] for sign in alive.values() if sign["waits"]})
        if not found and len(waits) > 1:  # ranks that disagree on what comes next
            found, waits = {r: f"it waits in {s['waits']}\n{s['stack']}" for r, s in alive.items()}, []
        others = f"; others wait in {', '.join(waits)}" if waits else ""
        for rank, text in found.items():
            late_file(self.run_dir, rank).write_text(text, encoding="utf-8")
            line = f"rank {rank} holds up the run for {waited_s:.0f} s{others}: {text.rstrip()}"
            logger.warning("%s", line, extra={"alert": "stall"})
        if not found and not self.rank:  # it may be a rank of another machine; if there is none, a device hangs
            text = "the ranks of this machine have waited for %.0f s in %s"
            logger.warning(text, waited_s, ", ".join(waits), extra={"alert": "stall"})
        self.reported = list(found)


def sign_file(run_dir: Path, rank: int) -> Path:
    return run_dir / FOLDER / f"{rank}.json"


def late_file(run_dir: Path, rank: int) -> Path:
    return run_dir / FOLDER / f"{rank}.late"


def read_sign(run_dir: Path, rank: int) -> Sign:
    """Return the last sign of life of a rank; {} if there is none."""
    try:
        return json.loads(sign_file(run_dir, rank).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def last_words(run_dir: Path, rank: int, sign: Sign) -> str:
    """Return why nothing more came from a rank, its stack after the first line; "" if that is not known."""
    if sign["host"] == socket.gethostname() and _kernel_says(sign["pid"], "status") in ("", "Z (zombie)", "X (dead)"):
        return f"its process {sign['pid']} on {sign['host']} was killed, or ran out of memory"
    late = late_file(run_dir, rank)
    return late.read_text(encoding="utf-8") if late.exists() else ""


def _state(sign: Sign) -> str:
    """Return what the kernel knows of a process of this machine, and where in the kernel it waits."""
    pid, name = sign["pid"], f"its process {sign['pid']} on {sign['host']}"
    return f"{name} is {_kernel_says(pid, 'status') or 'dead'}, in {_kernel_says(pid, 'wchan')} of the kernel"


def _kernel_says(pid: int, what: str) -> str:
    with suppress(OSError):
        text = Path(f"/proc/{pid}/{what}").read_text(encoding="utf-8")
        return text.partition("State:\t")[2].partition("\n")[0] if what == "status" else text
    return ""
