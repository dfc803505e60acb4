"""status.json: whether a run is queued, running, finished, stopped, given up or failed."""

import json
import logging
import math
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from tracking.metrics_file import last_step, read_records
from tracking.run_folder import Lines, is_held, write_atomically

NAME = "status.json"
CRASHES = "crashes.jsonl"  # to which every rank adds its own
RESERVED = 1024  # bytes for how a run ends, if the disk is full by then

logger = logging.getLogger(__name__)


def read_status(run_dir: Path) -> dict[str, Any]:
    """Return the status of a run folder; {} if it has none."""
    try:
        return json.loads((run_dir / NAME).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


class Status:
    """Keeps a run's status.json for the duration of the context; rank 0 writes it."""

    def __init__(self, run_dir: Path, run_config: dict[str, Any], *, rank: int = 0) -> None:
        self.run_dir, self.rank = run_dir, rank
        self.record: dict[str, Any] = {"state": "running", "config": run_config}

    def __enter__(self) -> "Status":
        self.before, self.first_step = read_status(self.run_dir), last_step(self.run_dir)
        self._write()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, Exception):
            step, reason = last_step(self.run_dir), f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            attempt = ".".join(os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "RESTART_COUNT"))
            crash = {"attempt": attempt, "step": step, "error": reason, "rank": self.rank, "time": time.time()}
            with closing(Lines(self.run_dir / CRASHES)) as lines:
                lines.write(json.dumps(crash) + "\n")
            refused = step == self.first_step and self.before.get("state") in ("finished", "given up", "stopped")
            self.record = self.before if refused else {**self.record, "state": "failed", "reason": reason}
        elif error is not None:
            self.record["state"] = "stopped"
        self._write()

    def end(self, valid_loss: float | None, *, stopped: bool, given_up: bool) -> None:
        """Record how the run ended; one that ended before its last step was stopped."""
        finished = not stopped and last_step(self.run_dir) >= self.record["config"]["steps"]
        state = "given up" if given_up else "finished" if finished else "stopped"
        known = valid_loss is not None and math.isfinite(valid_loss)
        self.record |= {"state": state, "valid_loss": valid_loss if known else None}

    def _write(self) -> None:
        if not self.rank:
            _write(self.run_dir, **self.record)


def _write(run_dir: Path, **record: Any) -> None:
    path, text = run_dir / NAME, json.dumps({**record, "time": time.time()})
    try:
        write_atomically(path, text + " " * RESERVED)
    except OSError as error:
        try:  # a full disk takes no second file, but the first one has its place
            with path.open("r+", encoding="utf-8") as file:
                file.write(text)
                file.truncate()
        except OSError:
            logger.warning("%s does not say %s: %s", path, record["state"], error)


def note_queued(run_dir: Path, run_config: dict[str, Any]) -> None:
    """Record that a run is to begin."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if not read_status(run_dir):
        _write(run_dir, state="queued", config=run_config)


def note_end(run_dir: Path, state: str, reason: str) -> None:
    """Record the end of a run that was killed before it could; one that another process holds goes on."""
    status = read_status(run_dir)
    if status.get("state") in ("running", "queued") and not is_held(run_dir):
        _write(run_dir, **{**status, "state": state, "reason": reason})


def crashed_the_same_way_twice(run_dir: Path) -> bool:
    """Return whether the last two attempts at a run crashed at the same step, first with the same error."""
    first: dict[str, dict[str, Any]] = {}  # by attempt
    for crash in sorted(read_records(run_dir / CRASHES), key=lambda crash: crash["time"]):
        first.setdefault(crash["attempt"], crash)
    last = [(crash["step"], crash["error"]) for crash in first.values()][-2:]
    return len(last) == 2 and last[0] == last[1]
