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

FOLDER = ".ranks"  # in a run folder: a file per rank
CHECKS = 10  # in the time after which a rank is late
MISSED = 3  # checks after which a process that wrote nothing is taken for stopped
FRAMES = 12  # innermost ones of a stack that are shown
ROOT = f"{Path(__file__).parent.parent}/"

logger = logging.getLogger(__name__)
# pid, host, and the time when the next one is due; of a late rank also where it is, its stack, and what it waits for
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
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        (self.run_dir / FOLDER).mkdir(exist_ok=True)
        self._write()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        sign_file(self.run_dir, self.rank).unlink(missing_ok=True)  # a process that is killed leaves it

    def _run(self) -> None:
        seen, since, reported = self.progress(), time.monotonic(), False
        while not self.ended.wait(self.late_s / CHECKS):
            if (now := self.progress()) != seen:
                seen, since, reported = now, time.monotonic(), False
            waited_s = time.monotonic() - since
            with suppress(OSError):  # a full disk, for instance
                self._write(**(self._where() if waited_s > self.late_s else {}))
                if waited_s > self.late_s and not reported:
                    reported = self._report(waited_s)

    def _write(self, **where: str) -> None:
        due = time.time() + MISSED * self.late_s / CHECKS
        sign = {"pid": os.getpid(), "host": socket.gethostname(), "due": due, **where}
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

    def _report(self, waited_s: float) -> bool:
        """Have the first rank of this machine name those that hold up the others, once all are late that can be."""
        signs = {rank: sign for rank in self.here if (sign := read_sign(self.run_dir, rank))}
        alive = {rank: sign for rank, sign in signs.items() if time.time() < sign["due"]}
        if self.rank != min(alive):
            return True
        if not all("at" in sign for sign in alive.values()):
            return False
        found = {rank: text for rank, sign in signs.items() if (text := last_words(sign))}
        waits = sorted({sign["waits"] for sign in alive.values() if sign["waits"]})
        if not found and len(waits) > 1:  # ranks that disagree on what comes next
            found, waits = {r: f"it waits in {s['waits']}\n{s['stack']}" for r, s in alive.items()}, []
        others = f"; others wait in {', '.join(waits)}" if waits else ""
        for rank, text in found.items():
            line = f"rank {rank} holds up the run for {waited_s:.0f} s{others}: {text.rstrip()}"
            logger.warning("%s", line, extra={"alert": "stall"})
        if not found and not self.rank:  # it may be a rank of another machine; if there is none, a device hangs
            text = "the ranks of this machine have waited for %.0f s in %s"
            logger.warning(text, waited_s, ", ".join(waits), extra={"alert": "stall"})
        return True


def sign_file(run_dir: Path, rank: int) -> Path:
    return run_dir / FOLDER / f"{rank}.json"


def read_sign(run_dir: Path, rank: int) -> Sign:
    """Return the last sign of life of a rank; {} if there is none."""
    try:
        return json.loads(sign_file(run_dir, rank).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def last_words(sign: Sign) -> str:
    """Return why a rank holds up the others, its stack after the first line; "" if it does not, or waits for them."""
    process = f"its process {sign['pid']} on {sign['host']}"
    if sign["host"] == socket.gethostname():  # clocks of machines differ
        state = _kernel_says(sign["pid"], "status").partition("State:\t")[2].partition("\n")[0]
        if state in ("", "Z (zombie)", "X (dead)"):
            return f"{process} was killed, or ran out of memory"
        if time.time() >= sign["due"]:
            return f"{process} is {state}, in {_kernel_says(sign['pid'], 'wchan')} of the kernel"
    return f"it hangs at {sign['at']}\n{sign['stack']}" if "at" in sign and not sign["waits"] else ""


def _kernel_says(pid: int, what: str) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/{what}").read_text(encoding="utf-8")
    return ""
