"""status.json: whether a run is running, finished, stopped or failed, for whoever runs or reads it again."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from tracking.run_folder import is_held

NAME = "status.json"
ENDS = ("finished", "given up", "stopped")
CRASHES = "crashes.jsonl"  # in which every rank notes its own


def read_status(run_dir: Path) -> dict[str, Any]:
    """Give what a run folder tells of itself; {} if it tells nothing, or was cut short in telling it."""
    try:
        return json.loads((run_dir / NAME).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}


class Status:
    """Keeps a run's status.json while the context lasts; ranks but the first write nothing."""

    def __init__(self, run_dir: Path, run_config: dict[str, Any], *, rank: int = 0) -> None:
        self.run_dir, self.rank = run_dir, rank
        self.record: dict[str, Any] = {"state": "running", "config": run_config}

    def __enter__(self) -> "Status":
        self.before, self.first_step = read_status(self.run_dir), self._step()
        self._write()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, Exception):
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            self.record |= {"state": "failed", "reason": reason}
            attempt = ".".join(os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "RESTART_COUNT"))
            crash = {"attempt": attempt, "step": self._step(), "error": reason, "rank": self.rank, "time": time.time()}
            with (self.run_dir / CRASHES).open("a") as file:
                file.write(json.dumps(crash) + "\n")
            if self._step() == self.first_step and self.before.get("state") in ENDS:
                self.record = self.before  # it was refused, and is what it was
        elif error is not None:
            self.record["state"] = "stopped"
        self._write()

    def end(self, valid_loss: float | None, *, stopped: bool, given_up: bool) -> None:
        """Note how the run ended; one that ended before its last step was stopped."""
        finished = not stopped and self._step() >= self.record["config"]["steps"]
        state = "given up" if given_up else "finished" if finished else "stopped"
        known = valid_loss is not None and math.isfinite(valid_loss)
        self.record |= {"state": state, "valid_loss": valid_loss if known else None}

    def _step(self) -> int:
        """The last step that was written down; a line may have been cut short."""
        path = self.run_dir / "metrics.jsonl"
        for line in reversed(path.read_text().splitlines() if path.exists() else []):
            try:
                return json.loads(line)["step"]
            except json.JSONDecodeError:
                continue
        return 0

    def _write(self) -> None:
        if not self.rank:
            _write(self.run_dir, self.record)


def _write(run_dir: Path, record: dict[str, Any]) -> None:
    partial = run_dir / f".{NAME}"
    partial.write_text(json.dumps({**record, "time": time.time()}))
    os.replace(partial, run_dir / NAME)


def note_queued(run_dir: Path, run_config: dict[str, Any]) -> None:
    """Note a run that is to begin."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if not read_status(run_dir):
        _write(run_dir, {"state": "queued", "config": run_config})


def note_end(run_dir: Path, state: str, reason: str) -> None:
    """Note the end of a run that could not note it itself; one that a process holds is another's, and goes on."""
    status = read_status(run_dir)
    if status.get("state") in ("running", "queued") and not is_held(run_dir):
        _write(run_dir, {**status, "state": state, "reason": reason})


def crashed_the_same_way_twice(run_dir: Path) -> bool:
    """Say whether the last two attempts at a run crashed first at the same step with the same error."""
    path = run_dir / CRASHES
    crashes = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    first: dict[str, dict[str, Any]] = {}
    for crash in sorted(crashes, key=lambda crash: crash["time"]):
        first.setdefault(crash["attempt"], crash)
    last = list(first.values())[-2:]
    return len(last) == 2 and all(last[0][key] == last[1][key] for key in ("step", "error"))
