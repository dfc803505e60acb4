"""The folder of a run: its lock, checks of configuration changes, its checkpoints, and the stop file."""

import fcntl
import json
import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conf.schema import defaults, free_keys
from model.config import shape_keys
from training.config import CheckpointConfig, CheckpointError, Resume

LOCK, SWEEP_LOCK = ".lock", ".sweep_lock"  # in the folder of a run, of a sweep
STEP = re.compile(r"step-(\d{8})")

logger = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path, rank: int = 0, name: str = LOCK) -> Iterator[None]:
    """Lock the folder of a run or sweep, on rank 0; raise `CheckpointError` if another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    if rank:
        yield
        return
    with (folder / name).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(folder, name) from None
        except OSError as error:
            raise CheckpointError(f"{folder} is on a disk without file locks ({error.strerror}); use another") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def is_held(run_dir: Path) -> bool:
    """Return whether a process has locked a run folder."""
    try:
        with (run_dir / LOCK).open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # locked, or no lock file
        return isinstance(error, BlockingIOError)
    return False


def check_not_held(run_dir: Path) -> None:
    if is_held(run_dir):
        raise _in_use(run_dir)


def _in_use(folder: Path, name: str = LOCK) -> CheckpointError:
    owner = (folder / name).read_text(encoding="utf-8").strip() or "another process"
    return CheckpointError(f"{folder} is in use by {owner}; wait for it, or pass another name=")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or {} if the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


class Lines:
    """A file to append lines to. If the disk is full or fails, lines are buffered and written later."""

    def __init__(self, path: Path) -> None:
        self.path, self.file, self.kept, self.failing = path, path.open("a+b", buffering=0), b"", False
        if self.file.tell():
            self.file.seek(-1, os.SEEK_END)
            self.kept = b"" if self.file.read(1) == b"\n" else b"\n"  # a killed process left an incomplete line

    def write(self, text: str) -> None:
        self.kept += text.encode("utf-8", "backslashreplace")
        was_failing, self.failing = self.failing, False
        try:
            while self.kept:
                self.kept = self.kept[self.file.write(self.kept) :]
        except OSError as error:
            self.failing = True
            if not was_failing:
                logger.warning("%s: %s; lines are kept in memory and written later", self.path, error)

    def flush(self) -> None:
        self.write("")

    def close(self) -> None:
        self.flush()
        self.file.close()


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, old value, new value) where two configurations differ; missing keys have their defaults."""
    for key in sorted({*old, *new}):
        dotted = f"{prefix}{key}"
        if key not in new and dotted not in defaults() and not isinstance(defaults().get(prefix[:-1]), dict):
            continue  # a setting that no longer exists
        before, now = (config.get(key, defaults().get(dotted)) for config in (old, new))
        if isinstance(before, dict) and isinstance(now, dict):
            yield from changed_keys(before, now, f"{dotted}.")
        elif before != now:
            yield dotted, before, now


def is_free_key(key: str, accepted: Sequence[str] = ()) -> bool:
    """Return whether a key may change on resume."""
    return any(key == free or key.startswith(f"{free}.") for free in (*free_keys(), *accepted))


def check_changes(old: dict[str, Any], new: dict[str, Any], accepted: Sequence[str], run_dir: Path) -> None:
    """Raise `CheckpointError` if a run would resume with a change that affects training."""
    changed = {key: values for key, *values in changed_keys(old, new) if not is_free_key(key, accepted)}
    if changed:
        listed = ", ".join(f"{key} ({before}, now {now})" for key, (before, now) in changed.items())
        raise CheckpointError(
            f"{run_dir} was started with another configuration: {listed}; pass another name=, or "
            f"checkpoint.accept_changes=[{','.join(changed)}] to resume it"
        )


def check_same_model(before: dict[str, Any], now: dict[str, Any], origin: Path) -> None:
    """Raise `CheckpointError` if two models cannot share weights; the vocabulary may grow."""
    if before["vocab_size"] < now["vocab_size"]:
        before = before | {"vocab_size": now["vocab_size"]}
    keys = [key for key in shape_keys() if key in before and before[key] != now[key]]
    if keys:
        values = " ".join(f"model.{key}={before[key]}" for key in keys)
        raise CheckpointError(f"{origin} is of another model; pass {values}")


def check_stored_config(run_dir: Path, run_config: dict[str, Any], config: CheckpointConfig) -> None:
    """Check a configuration against the checkpoint that it would start from, before any device is used.

    An unreadable checkpoint is ignored here, and reported when it is opened.
    """
    own, init_from = committed(run_dir / "checkpoints")[:1], run_config["init_from"]
    if own and config.resume is Resume.never:
        raise CheckpointError(f"checkpoint.resume (never): {run_dir} has {own[0].name}; pass another name=")
    if not own and config.resume is Resume.must and config.path is None:
        raise CheckpointError(f"checkpoint.resume (must): {run_dir} has no checkpoint; pass checkpoint.resume=auto")
    for checkpoint in own or (init_from and checkpoints_of(Path(init_from))[:1]) or ():
        try:
            stored = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["config"]
        except (OSError, ValueError, KeyError):
            return
        if own:
            check_changes(stored, run_config, config.accept_changes, run_dir)
        else:
            check_same_model(stored["model"], run_config["model"], checkpoint)


def committed(folder: Path) -> list[Path]:
    """Return the committed checkpoints in a folder, newest step first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if STEP.fullmatch(path.name)), reverse=True)


def checkpoints_of(path: Path) -> list[Path]:
    """Return the checkpoint at a path, or those of a run folder or its `checkpoints`, newest first."""
    is_checkpoint = (path / "manifest.json").exists() or (STEP.fullmatch(path.name) and path.is_dir())
    return [path] if is_checkpoint else committed(path / "checkpoints") or committed(path)


def checkpoints_in(path: Path, step: int | None = None) -> list[Path]:
    """Return `checkpoints_of(path)`, or only that of `step`; raise `CheckpointError` if there is none."""
    found = checkpoints_of(path)
    if not found:
        raise CheckpointError(f"there is no checkpoint in {path}; name a run folder such as runs/demo, or a checkpoint")
    if step is None:
        return found
    steps = {int(name[1]): path for path in found if (name := STEP.fullmatch(path.resolve().name))}
    if step not in steps:
        known = ", ".join(map(str, sorted(steps)))
        raise CheckpointError(f"step ({step}): {path} has no checkpoint of that step; choose from {known}")
    return [steps[step]]


def run_dir_of(path: Path, step: int | None = None) -> Path:
    """Return the run folder of a path, which may be a checkpoint in it, relative, or a symbolic link."""
    checkpoint = checkpoints_in(path, step)[0]  # <run>/checkpoints/step-<n>
    spellings = (checkpoint, Path(os.path.abspath(checkpoint)), checkpoint.resolve())
    return next((path for path in spellings if path.parent.name == "checkpoints"), checkpoint.resolve()).parents[1]


def check_origin(init_from: Path) -> None:
    """Raise `CheckpointError` if `init_from` has no weights."""
    if not (init_from / "config.json").exists() and not checkpoints_of(init_from):
        what = f"init_from ({init_from}) has neither a checkpoint nor a config.json"
        raise CheckpointError(f"{what}; name a run, a checkpoint, or a Hugging Face folder")


class StopFile:
    """A file with N: save at step N and stop; -N: save at step N and continue (InternLM's `stop_file_path`)."""

    def __init__(self, path: str | None) -> None:
        self.path, self.ignored = Path(path or os.devnull), ""

    def read(self, step: int) -> tuple[bool, bool]:
        """Return whether to save at `step`, and whether to stop there."""
        text = self.path.read_text(encoding="utf-8").strip() if self.path.exists() else ""
        asked = int(text) if text.removeprefix("-").isdecimal() else 0
        if text != self.ignored and not asked:
            logger.warning("%s has %r, which is not a step number; ignored", self.path, text)
            self.ignored = text
        return abs(asked) == step, 0 < asked <= step
