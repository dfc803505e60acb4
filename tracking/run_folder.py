"""The folder of a run: one process at a time, one configuration, and a file that can ask it to stop."""

import fcntl
import json
import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from conf.schema import free_keys
from model.config import ModelConfig
from training.config import CheckpointConfig, CheckpointError, Resume

logger = logging.getLogger(__name__)

LOCK, SWEEP_LOCK = ".lock", ".sweep_lock"  # of a run, and of a sweep in whose folder runs are
STEP = re.compile(r"step-(\d{8})")
# What makes a model another one: its tensors, the number of heads in them, and what is computed between them
SHAPE_KEYS = [f.name for f in fields(ModelConfig) if not f.metadata.get("free")]


@contextmanager
def locked(run_dir: Path, rank: int = 0, name: str = LOCK) -> Iterator[None]:
    """Hold a run's folder, or a sweep's, by its rank 0; raises `CheckpointError` if another process has it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if rank:
        yield
        return
    path = run_dir / name
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held_by_another(run_dir, name) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def refuse_held(run_dir: Path) -> None:
    """Raise `CheckpointError` if a process holds a run folder."""
    if is_held(run_dir):
        raise _held_by_another(run_dir, LOCK)


def _held_by_another(run_dir: Path, name: str) -> CheckpointError:
    owner = (run_dir / name).read_text().strip() or "another process"
    return CheckpointError(f"{run_dir} is in use by {owner}; wait for it, or pass another name=")


def is_held(run_dir: Path) -> bool:
    """Say whether a process holds a run folder."""
    try:
        with (run_dir / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except BlockingIOError:
        return True
    return False


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, old value, new value) wherever two configurations differ."""
    for key in sorted({*old, *new}):
        before, now, dotted = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(now, dict):
            yield from changed_keys(before, now, f"{dotted}.")
        elif before != now:
            yield dotted, before, now


def is_free_key(key: str, accepted: Sequence[str] = ()) -> bool:
    """Return whether a key may change when a run is resumed."""
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in (*free_keys(), *accepted))


def refuse_changes(old: dict[str, Any], new: dict[str, Any], accepted: list[str], run_dir: Path) -> None:
    """Refuse to go on with a run under another configuration than it began with."""
    changed = [(key, before, now) for key, before, now in changed_keys(old, new) if not is_free_key(key, accepted)]
    if changed:
        told = ", ".join(f"{key} ({before}, now {now})" for key, before, now in changed)
        keys = ",".join(key for key, _, _ in changed)
        raise CheckpointError(
            f"{run_dir} was begun with another configuration: {told}; pass another name= for a new run, or "
            f"checkpoint.accept_changes=[{keys}] to go on all the same"
        )


def refuse_other_model(old: dict[str, Any], new: dict[str, Any], origin: Path) -> None:
    """Refuse weights of a model that has other tensors."""
    before, now = old["model"], new["model"]
    changed = [key for key in SHAPE_KEYS if before[key] != now[key]]
    if changed:
        told = ", ".join(f"model.{key} ({before[key]}, now {now[key]})" for key in changed)
        raise CheckpointError(f"{origin} is of another model: {told}; give the values that it was made with")


def refuse_early(run_dir: Path, run_config: dict[str, Any], config: CheckpointConfig) -> None:
    """Refuse what stored configurations alone can tell, before any device is touched.

    What cannot be read here is left to whoever verifies the checkpoint.
    """
    for folder in committed(run_dir / "checkpoints")[:1]:
        stored = _stored_config(folder)
        if stored is not None and config.resume is not Resume.never:
            refuse_changes(stored, run_config, config.accept_changes, run_dir)
        return
    origin = Path(run_config["init_from"] or "")
    if run_config["init_from"] is None or (origin / "config.json").exists():
        return
    for folder in ([origin] if (origin / "state.json").exists() else committed(origin / "checkpoints"))[:1]:
        stored = _stored_config(folder)
        if stored is not None:
            refuse_other_model(stored, run_config, folder)


def checkpoints_of(path: Path) -> list[Path]:
    """Give the checkpoint that a path is, or those of a run folder, newest first."""
    if (path / "manifest.json").exists() or STEP.fullmatch(path.name):
        return [path]
    return committed(path / "checkpoints")


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, newest step first; file times say nothing."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if STEP.fullmatch(path.name)), reverse=True)


def _stored_config(checkpoint: Path) -> dict[str, Any] | None:
    try:
        return json.loads((checkpoint / "state.json").read_text())["config"]
    except (OSError, ValueError, KeyError):
        return None


class StopFile:
    """A file holding N: save at step N and stop; -N: save at step N and go on (InternLM's `stop_file_path`)."""

    def __init__(self, path: str | None) -> None:
        self.path = Path(path) if path else None
        self.told = ""

    def read(self, step: int) -> tuple[bool, bool]:
        """Say whether to save at `step`, and whether to stop there."""
        if self.path is None or not self.path.exists():
            return False, False
        text = self.path.read_text().strip()
        try:
            asked = int(text)
        except ValueError:
            if text != self.told:
                logger.warning("%s holds %r, which is no step; it is not followed", self.path, text)
                self.told = text
            return False, False
        return abs(asked) == step, 0 < asked <= step


def truncate_metrics(path: Path, step: int, validated: bool) -> None:
    """Drop the records after `step`, and a half-written last one, of a run that goes on from there.

    The validation of `step` itself is dropped too unless it was done before the checkpoint.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        again = record["step"] == step and "valid/loss" in record and not validated
        if record["step"] <= step and not again:
            kept.append(line + "\n")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)
