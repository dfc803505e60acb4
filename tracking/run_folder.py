"""The folder of a run: held by one process, of one configuration, with checkpoints and a file that can stop it."""

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

LOCK, SWEEP_LOCK = ".lock", ".sweep_lock"  # in the folders of a run and of a sweep
STEP = re.compile(r"step-(\d{8})")

logger = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path, rank: int = 0, name: str = LOCK) -> Iterator[None]:
    """Hold the folder of a run or sweep; rank 0 does. Raises `CheckpointError` if another process holds it."""
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
    """Return whether a process holds a run folder."""
    try:
        with (run_dir / LOCK).open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # or there is no lock
        return isinstance(error, BlockingIOError)
    return False


def check_not_held(run_dir: Path) -> None:
    if is_held(run_dir):
        raise _in_use(run_dir)


def _in_use(folder: Path, name: str = LOCK) -> CheckpointError:
    owner = (folder / name).read_text(encoding="utf-8").strip() or "another process"
    return CheckpointError(f"{folder} is in use by {owner}; wait for it, or pass another name=")


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


class Lines:
    """A file that lines are added to. What a full or failing disk does not take is kept and tried again."""

    def __init__(self, path: Path) -> None:
        self.path, self.file, self.kept, self.failing = path, path.open("a+b", buffering=0), b"", False
        if self.file.tell():
            self.file.seek(-1, os.SEEK_END)
            self.kept = b"" if self.file.read(1) == b"\n" else b"\n"  # the last line was cut short by a kill

    def write(self, text: str) -> None:
        self.kept += text.encode("utf-8", "backslashreplace")
        was_failing, self.failing = self.failing, False
        try:
            while self.kept:
                self.kept = self.kept[self.file.write(self.kept) :]
        except OSError as error:
            self.failing = True
            if not was_failing:
                logger.warning("%s: %s; its lines are kept and tried again", self.path, error)

    def flush(self) -> None:
        self.write("")

    def close(self) -> None:
        self.flush()
        self.file.close()


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, old value, new value) where two configurations differ; one without a key has its default."""
    for key in sorted({*old, *new}):
        dotted = f"{prefix}{key}"
        if key not in new and dotted not in defaults() and not isinstance(defaults().get(prefix[:-1]), dict):
            continue  # a setting that is no more
        before, now = (its.get(key, defaults().get(dotted)) for its in (old, new))
        if isinstance(before, dict) and isinstance(now, dict):
            yield from changed_keys(before, now, f"{dotted}.")
        elif before != now:
            yield dotted, before, now


def is_free_key(key: str, accepted: Sequence[str] = ()) -> bool:
    """Return whether a key may change when a run is resumed."""
    return any(key == free or key.startswith(f"{free}.") for free in (*free_keys(), *accepted))


def check_changes(old: dict[str, Any], new: dict[str, Any], accepted: Sequence[str], run_dir: Path) -> None:
    """Raise `CheckpointError` if a run would resume under a configuration that differs in what it learns."""
    changed = {key: values for key, *values in changed_keys(old, new) if not is_free_key(key, accepted)}
    if changed:
        listed = ", ".join(f"{key} ({before}, now {now})" for key, (before, now) in changed.items())
        raise CheckpointError(
            f"{run_dir} was begun with another configuration: {listed}; pass another name=, or "
            f"checkpoint.accept_changes=[{','.join(changed)}] to resume it"
        )


def check_same_model(before: dict[str, Any], now: dict[str, Any], origin: Path) -> None:
    """Raise `CheckpointError` if a model has other tensors, but for a larger vocabulary, or computes another thing."""
    if before["vocab_size"] < now["vocab_size"]:
        before = before | {"vocab_size": now["vocab_size"]}
    keys = [key for key in shape_keys() if key in before and before[key] != now[key]]
    if keys:
        values = " ".join(f"model.{key}={before[key]}" for key in keys)
        raise CheckpointError(f"{origin} is of another model; pass {values}")


def check_stored_config(run_dir: Path, run_config: dict[str, Any], config: CheckpointConfig) -> None:
    """Check a configuration against that of the checkpoint it would begin from, before any device is touched.

    A checkpoint that cannot be read is left to the verification when it is opened.
    """
    own, init_from = committed(run_dir / "checkpoints")[:1], run_config["init_from"]
    if own and config.resume is Resume.never:
        raise CheckpointError(f"checkpoint.resume (never): {run_dir} holds {own[0].name}; pass another name=")
    if not own and config.resume is Resume.must and config.path is None:
        raise CheckpointError(f"checkpoint.resume (must): {run_dir} holds no checkpoint; pass checkpoint.resume=auto")
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
    """Return the checkpoint that a path is, or those of a run folder or its `checkpoints`, newest first."""
    is_checkpoint = (path / "manifest.json").exists() or (STEP.fullmatch(path.name) and path.is_dir())
    return [path] if is_checkpoint else committed(path / "checkpoints") or committed(path)


def checkpoints_in(path: Path, step: int | None = None) -> list[Path]:
    """Return `checkpoints_of`, or the one of a step; raises `CheckpointError` if there is none."""
    found = checkpoints_of(path)
    if not found:
        raise CheckpointError(f"there is no checkpoint in {path}; name a run folder such as runs/demo, or a checkpoint")
    if step is None:
        return found
    steps = {int(name[1]): one for one in found if (name := STEP.fullmatch(one.resolve().name))}
    if step not in steps:
        known = ", ".join(map(str, sorted(steps)))
        raise CheckpointError(f"step ({step}): {path} has no checkpoint of that step; choose from {known}")
    return [steps[step]]


def run_dir_of(path: Path, step: int | None = None) -> Path:
    """Return the folder of a run by its path or that of a checkpoint in it, however it is spelt."""
    checkpoint = checkpoints_in(path, step)[0]  # <run>/checkpoints/step-<n>
    spellings = (checkpoint, Path(os.path.abspath(checkpoint)), checkpoint.resolve())
    return next((one for one in spellings if one.parent.name == "checkpoints"), checkpoint.resolve()).parents[1]


def check_origin(init_from: Path) -> None:
    """Raise `CheckpointError` if there are no weights to begin from."""
    if not (init_from / "config.json").exists() and not checkpoints_of(init_from):
        what = f"init_from ({init_from}) holds neither a checkpoint nor a config.json"
        raise CheckpointError(f"{what}; name a run, a checkpoint, or a Hugging Face folder")


class StopFile:
    """A file holding N: save at step N and stop; -N: save at step N and go on (InternLM's `stop_file_path`)."""

    def __init__(self, path: str | None) -> None:
        self.path, self.ignored = Path(path or os.devnull), ""

    def read(self, step: int) -> tuple[bool, bool]:
        """Return whether to save at `step`, and whether to stop there."""
        text = self.path.read_text(encoding="utf-8").strip() if self.path.exists() else ""
        asked = int(text) if text.removeprefix("-").isdecimal() else 0
        if text != self.ignored and not asked:
            logger.warning("%s holds %r, which is no step; it is ignored", self.path, text)
            self.ignored = text
        return abs(asked) == step, 0 < asked <= step
