"""status.json: whether a run is queued, running, finished, stopped, given up or failed."""

import json
import logging
import math
import os
import re
import socket
import time
import traceback
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from launch.config import RankError
from tracking.heartbeat import last_words, sign_file
from tracking.logs import without_secrets
from tracking.metrics_file import last_step, read_records
from tracking.run_folder import Lines, is_held, read_json, write_atomically

NAME = "status.json"
CRASHES = "crashes.jsonl"  # crashes of all ranks
MOST_CHARS = 4000  # of a traceback
CAUSE_S = 2.0  # wait for the rank that failed first to record its error
# Errors of a rank that follow from the failure of another one
SYMPTOM = re.compile(
    r"closed by peer|connection reset|broken pipe|lost the others|nccl|(?<!DataLoader )timed?[ _-]?out", re.IGNORECASE
)
ALERTS = {"finished": "end", "failed": "crash"}  # by state; any other is a stop
RESERVED = 8192  # bytes of padding, so that the final status fits on a full disk

logger = logging.getLogger(__name__)


def read_status(run_dir: Path) -> dict[str, Any]:
    """Return the status of a run folder, or {}."""
    return read_json(run_dir / NAME)


def attempt() -> str:
    """Return the id of this attempt of a Slurm job."""
    return ".".join(os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "RESTART_COUNT"))


class Status:
    """A context manager that maintains status.json, on rank 0 or else the first surviving rank.

    A rank that failed because of another one raises that rank's failure as a `RankError`.
    """

    def __init__(self, run_dir: Path, run_config: dict[str, Any], *, rank: int = 0, ranks: int = 1) -> None:
        self.run_dir, self.rank, self.ranks = run_dir, rank, ranks
        self.record: dict[str, Any] = {"state": "running", "config": run_config}

    def __enter__(self) -> "Status":
        self.before, self.first_step, self.began = read_status(self.run_dir), last_step(self.run_dir), time.time()
        if not self.rank:
            _write(self.run_dir, self.record)
            if self.before.get("state") == "running":
                text = "the last attempt ended without a word: it was killed, ran out of memory, or its machine failed"
                logger.warning(text, extra={"alert": "crash"})
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        cause, speaks = None, not self.rank
        if isinstance(error, Exception):
            cause, speaks = self._crash(error)
        elif error is not None:
            self.record["state"] = "stopped"
        if speaks:
            _write(self.run_dir, self.record)
        state, text = self.record["state"], self.record.get("traceback", "") + self.record.get("reason", "")
        alert = {"alert": ALERTS.get(state, "stop")} if speaks and self.record is not self.before else {}
        logger.log(logging.ERROR if cause else logging.INFO, text or state, extra={"file_only": True, **alert})
        if cause is not None and cause is not error:
            raise cause from error

    def _crash(self, error: Exception) -> tuple[Exception, bool]:
        """Record this rank's failure; return the first failure, and whether this rank writes the status."""
        step, reason = last_step(self.run_dir), f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        trace = "".join(traceback.format_exception(error))[-MOST_CHARS:]
        mine = {"attempt": attempt(), "step": step, "error": reason, "rank": self.rank, "time": time.time()}
        mine["traceback"] = trace
        with suppress(OSError), closing(Lines(self.run_dir / CRASHES)) as lines:  # the disk may have failed
            lines.write(without_secrets(json.dumps(mine)) + "\n")
        first, speaks = mine, not self.rank
        if self.ranks > 1:
            if SYMPTOM.search(reason):
                first, speaks = self._first_failure(mine)
            reason = f"rank {first['rank']} failed first: {first['error']}"
        if step == self.first_step and self.before.get("state") in ("finished", "given up", "stopped"):
            self.record = self.before  # it failed before it started
        else:
            self.record |= {"state": "failed", "reason": reason, "traceback": first["traceback"]}
        text = f"error: rank {first['rank']} failed first\n{first['traceback']}"
        return error if first["rank"] == self.rank else RankError(text), speaks

    def _first_failure(self, mine: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Wait for other ranks to record their failures; return the first, and whether no lower rank recorded one."""
        deadline, crashes, causes = time.monotonic() + CAUSE_S, [], []
        while not causes and time.monotonic() < deadline:
            time.sleep(CAUSE_S / 20)
            crashes = [c for c in read_records(self.run_dir / CRASHES) if c["time"] >= self.began]
            causes = [crash for crash in crashes if not SYMPTOM.search(crash["error"])]
        silent = sorted(set(range(self.ranks)) - {crash["rank"] for crash in crashes})
        signs = {rank: sign for rank in silent if (sign := read_json(sign_file(self.run_dir, rank)))}
        words = {rank: last_words(sign) for rank, sign in signs.items()}
        hosts = {sign["host"] for sign in signs.values()}
        if not any(words.values()) and len(hosts) == 1 and socket.gethostname() not in hosts:  # a machine failed
            words[min(words)] = f"nothing more came from {hosts.pop()}"
        for rank, text in words.items():
            error, _, stack = text.partition("\n")
            if text:
                causes.append({"rank": rank, "error": error, "traceback": f"{stack}{error}\n", "time": math.inf})
        speaks = self.rank == min([self.rank, *(crash["rank"] for crash in crashes)])
        return min(causes, key=lambda cause: cause["time"], default=mine), speaks

    def end(self, objective: float | None, *, stopped: bool, given_up: bool, saved_step: int = 0, **more: Any) -> None:
        """Record how the run ended; `stopped` if before its last step.

        `saved_step` is the last checkpoint's, which may come from elsewhere, without metrics.
        """
        finished = not stopped and max(saved_step, last_step(self.run_dir)) >= self.record["config"]["steps"]
        state = "given up" if given_up else "finished" if finished else "stopped"
        known = objective is not None and math.isfinite(objective)
        self.record |= {"state": state, "objective": objective if known else None, **more}


def _write(run_dir: Path, record: dict[str, Any]) -> None:
    path, text = run_dir / NAME, without_secrets(json.dumps({**record, "time": time.time()}))
    try:
        write_atomically(path, text + " " * RESERVED)
    except OSError as error:
        try:  # on a full disk, overwrite the file in place
            with path.open("r+", encoding="utf-8") as file:
                file.write(text)
                file.truncate()
        except OSError:
            logger.warning("%s could not be set to %s: %s", path, record["state"], error)


def note_queued(run_dir: Path, run_config: dict[str, Any]) -> None:
    """Record that a run is queued."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if not read_status(run_dir):
        _write(run_dir, {"state": "queued", "config": run_config})


def note_followed(run_dir: Path, text: str) -> None:
    """Record what followed a stop or crash, such as a requeue."""
    if status := read_status(run_dir):
        _write(run_dir, status | {"stop": {**status.get("stop", {}), "followed": text}})


def note_end(run_dir: Path, state: str, reason: str) -> None:
    """Record the end of a run that was killed, unless a process still runs it."""
    status = read_status(run_dir)
    if status.get("state") in ("running", "queued") and not is_held(run_dir):
        _write(run_dir, status | {"state": state, "reason": reason})


def crashed_the_same_way_twice(run_dir: Path) -> bool:
    """Return whether the first crashes of the last two attempts have the same step and error."""
    first: dict[str, tuple[int, str]] = {}  # by attempt
    for crash in sorted(read_records(run_dir / CRASHES), key=lambda crash: crash["time"]):
        first.setdefault(crash["attempt"], (crash["step"], crash["error"]))
    last = list(first.values())[-2:]
    return len(last) == 2 and last[0] == last[1]
