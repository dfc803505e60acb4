"""Heartbeats: reports which ranks are stopped or hang, and where, before a timeout ends the run."""

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

from tracking.run_folder import read_json, write_atomically

FOLDER = ".ranks"  # in a run folder: a file per rank
CHECKS = 10  # per `late_s`
EXPIRED = 1.8  # of `late_s`: shortly before NCCL's timeout
MISSED = 3  # checks without a heartbeat after which a process counts as stopped
FRAMES = 12  # innermost stack frames to print
ROOT = f"{Path(__file__).parent.parent}/"

logger = logging.getLogger(__name__)
# pid, host, and the time when the next heartbeat is due; of a late rank also location, stack, and pending collective
Sign = dict[str, Any]


class Heartbeat:
    """A thread that writes this rank's heartbeat, and reports the ranks of this machine that block the others.

    A rank is late if `progress()` has not changed for `late_s`. `pending()` is the collective that the device waits
    in, or "". `expire()` is called if the device does not return after `EXPIRED` times `late_s`.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        progress: Callable[[], int],
        *,
        late_s: float,
        pending: Callable[[], str],
        expire: Callable[[], object],
    ) -> None:
        self.run_dir, self.rank, self.progress, self.late_s = run_dir, rank, progress, late_s
        self.pending, self.expire = pending, expire
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
        sign_file(self.run_dir, self.rank).unlink(missing_ok=True)  # stays if the process is killed

    def _run(self) -> None:
        seen, since, reported, stack = self.progress(), time.monotonic(), False, None
        while not self.ended.wait(self.late_s / CHECKS):
            if (now := self.progress()) != seen:
                seen, since, reported, stack = now, time.monotonic(), False, None
            waited_s = time.monotonic() - since
            where = self._where() if waited_s > self.late_s else {}
            with suppress(OSError):  # such as a full disk
                self._write(**where)
                if waited_s > self.late_s and not reported:
                    reported = self._report(waited_s)
            stack = stack or where.get("stack")
            same = waited_s > EXPIRED * self.late_s and where["stack"] == stack
            if same and where["waits"] == self.pending():  # collectives of the host have timeouts of their own
                self.expire()
                stack = "expired"

    def _write(self, **where: str) -> None:
        due = time.time() + MISSED * self.late_s / CHECKS
        sign = {"pid": os.getpid(), "host": socket.gethostname(), "due": due, **where}
        write_atomically(sign_file(self.run_dir, self.rank), json.dumps(sign))

    def _where(self) -> Sign:
        """Return the main thread's location and stack, and the collective that it or its device waits in."""
        stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
        names = [frame.filename.removeprefix(ROOT) for frame in stack]
        ours = max(n for n, name in enumerate(names) if n == 0 or (name[0] != "/" and "site-packages" not in name))
        calls = [frame.name for frame in stack[ours + 1 :] if "torch/distributed" in frame.filename]
        at = f"{names[ours]}:{stack[ours].lineno} ({stack[ours].name})"
        waits = self.pending() or (f"{calls[-1]} at {at}" if calls else "")
        return {"at": at, "waits": waits, "stack": "".join(traceback.format_list(stack[-FRAMES:]))}

    def _report(self, waited_s: float) -> bool:
        """On this machine's first rank, report the ranks that block the others, once all living ranks are late."""
        signs = {rank: sign for rank in self.here if (sign := read_json(sign_file(self.run_dir, rank)))}
        alive = {rank: sign for rank, sign in signs.items() if time.time() < sign["due"]}
        if self.rank != min(alive):
            return True
        if not all("at" in sign for sign in alive.values()):
            return False
        found = {rank: text for rank, sign in signs.items() if (text := last_words(sign))}
        waits = sorted({sign["waits"] for sign in alive.values() if sign["waits"]})
        if not found and len(waits) > 1:  # ranks wait in different collectives
            found, waits = {r: f"it waits in {s['waits']}\n{s['stack']}" for r, s in alive.items()}, []
        others = f"; others wait in {', '.join(waits)}" if waits else ""
        for rank, text in found.items():
            line = f"rank {rank} holds up the run for {waited_s:.0f} s{others}: {text.rstrip()}"
            logger.warning("%s", line, extra={"alert": "stall"})
        if not found and not self.rank:  # a rank of another machine, or a device, hangs
            text = "the ranks of this machine have waited for %.0f s in %s"
            logger.warning(text, waited_s, ", ".join(waits), extra={"alert": "stall"})
        return True


def sign_file(run_dir: Path, rank: int) -> Path:
    return run_dir / FOLDER / f"{rank}.json"


def last_words(sign: Sign) -> str:
    """Return why a rank blocks the others, and its stack; "" if it does not."""
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
