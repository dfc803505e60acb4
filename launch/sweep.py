"""Run the unfinished points of a sweep as jobs, and compare the results."""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.schema import PrepareConfig, TrainConfig
from launch.config import UserError, Where, is_user_error
from launch.environment import nproc_per_node
from tracking.logs import without_secrets
from tracking.metrics_file import last_value
from tracking.run_folder import SWEEP_LOCK, changed_keys, is_free_key, locked
from tracking.status import note_end, note_queued, read_status

if TYPE_CHECKING:
    from launch.jobs import Point

CODE = Path(__file__).parent.parent

logger = logging.getLogger(__name__)


class SweepError(UserError):
    """Some points of a sweep cannot start or did not finish."""


def run_points(points: "Sequence[Point]", sweep_dir: Path) -> list[float | SweepError | None]:
    """Run the job of each unfinished point; return rank 0's values, or errors.

    The value of a point that early_stop has given up is inf. Raises `SweepError` before any job starts if one cannot.
    """
    from launch.jobs import Outcome, run_jobs
    from tracking.compare import compare
    from tracking.logs import screen

    for point in points:
        run_dir, objective = point.job.run_dir, point.described.get("objective", "")
        if is_finished(run_dir, point.described):
            point.end = Outcome("finished", _value(run_dir, last_value(run_dir, objective)))
    missing = [point for point in points if point.end is None]
    _check(missing, len(points))
    begun: list[Point] = []

    def begin(point: "Point") -> None:
        begun.append(point)
        if point.job.work == "train:work":
            note_queued(point.job.run_dir, point.described)

    def report(point: "Point", end: Outcome) -> None:
        if end.state == "finished":
            value = end.value = _value(point.job.run_dir, end.value)
            shown = "" if value in (None, math.inf) else f", {point.described['objective']} {value:.4f}"
            logger.info("%s: %s%s", "given up" if value == math.inf else "finished", point.name, shown)
        else:
            note_end(point.job.run_dir, end.state, end.reason)
            print(without_secrets(f"error: {point.name} {end.state}: {end.reason}"), file=sys.stderr)

    starts_here = any(point.job.launcher.where is Where.local for point in missing)
    with screen(), locked(sweep_dir, name=SWEEP_LOCK) if starts_here else nullcontext():
        for point in points:
            if point.end is not None:
                logger.info("%s already: %s", read_status(point.job.run_dir)["state"], point.job.run_dir)
        try:
            if missing:
                run_jobs(missing, sweep_dir.resolve() / ".jobs", keep_code(sweep_dir / ".code"), begin, report)
        except BaseException:
            for point in begun:
                note_end(point.job.run_dir, "stopped", "")
            raise
        if points[0].job.work == "train:work" and any(point.label for point in points):
            compare(sweep_dir)
    failed = [point.name for point in points if point.end is None or point.end.state != "finished"]
    error = SweepError(f"{len(failed)} of {len(points)} points did not finish: {', '.join(failed)}")
    return [point.end.value if point.end is not None and point.end.state == "finished" else error for point in points]


def _value(run_dir: Path, value: float | None) -> float | None:
    return math.inf if read_status(run_dir).get("state") == "given up" else value


def _check(points: "Sequence[Point]", n_points: int) -> None:
    """Raise `SweepError` with all errors of all points."""
    if shared := [point for n, point in enumerate(points) if point.job.run_dir in {p.job.run_dir for p in points[:n]}]:
        raise SweepError(f"points share {shared[0].job.run_dir}; name each value once, or set hydra.sweep.subdir")
    if problems := tried([(point.label, point.check) for point in points], n_points)[1]:
        raise SweepError("\n".join(problems))


def tried(steps: Iterable[tuple[str, Callable[[], Any]]], n_points: int) -> tuple[list[Any], list[str]]:
    """Run a step for each labelled point; return the results, and each user error once, with its points."""
    made, labels = [], defaultdict[str, list[str]](list)  # the points with each problem
    for label, step in steps:
        try:
            made.append(step())
        except Exception as error:
            if not is_user_error(error):
                raise
            for problem in str(error).splitlines() or [repr(error)]:
                labels[problem].append(label)
    problems = []
    for problem, at in labels.items():
        others = f" and {len(at) - 1} more" if len(at) > 1 else ""
        problems.append(problem if len(at) == n_points else f"{problem} (at {at[0]}{others})")
    return made, problems


def share_cores(config: TrainConfig | PrepareConfig, n_points: int) -> TrainConfig | PrepareConfig:
    """Return a local point's configuration with its share of the CPU cores."""
    launcher = config.launcher
    share = len(os.sched_getaffinity(0)) // (launcher.parallel_jobs or n_points)
    if launcher.where is not Where.local:
        return config
    if isinstance(config, PrepareConfig):
        return replace(config, workers=config.workers or max(1, share))
    threads = config.parallel.threads or max(1, share // nproc_per_node(config.parallel, launcher))
    return replace(config, parallel=replace(config.parallel, threads=threads))


def is_finished(run_dir: Path, run_config: dict[str, Any]) -> bool:
    """Return whether a run folder has finished this run, or was given up by the same early_stop."""
    status = read_status(run_dir)
    given_up = status.get("state") == "given up" and status["config"]["early_stop"] == run_config["early_stop"]
    if not given_up and status.get("state") != "finished":
        return False
    return all(is_free_key(key) for key, _, _ in changed_keys(status["config"], run_config))


def folder_name(overrides: str) -> str:
    """Return a folder name for a point's settings, with a hash if they had to be changed or truncated."""
    bare = re.sub(r"(^|,)\++", r"\1", overrides.translate({ord(sign): None for sign in "'\"\\"}))
    name = re.sub(r"[/\x00-\x1f]", "_", bare)
    if name == bare and len(os.fsencode(name)) <= 255:
        return name
    return os.fsencode(name)[:200].decode(errors="ignore") + "-" + hashlib.sha256(bare.encode()).hexdigest()[:8]


@contextmanager
def removed_if_unused(folder: Path) -> Iterator[None]:
    """Remove the folder of a run or sweep that did not start, if it has only Hydra's files."""
    try:
        yield
    finally:
        if {path.name for path in folder.glob("*")} in ({".hydra"}, {"multirun.yaml"}):
            with suppress(OSError):
                shutil.rmtree(folder)
                os.removedirs(folder.parent)  # and empty parents


def code_files() -> dict[str, str]:
    """Return the code and conf/ of this repository, with packages of the user's own in it: text by relative path."""
    rooms = {path.parent for path in CODE.glob("*/__init__.py")} | {CODE / "hydra_plugins"}
    rooms -= {CODE / "tests", CODE / "benchmarks"}
    files = {path for room in rooms for path in room.rglob("*.*") if path.suffix in (".py", ".yaml")}
    files |= set(CODE.glob("*.py"))
    return {str(path.relative_to(CODE)): path.read_text(encoding="utf-8") for path in sorted(files)}


def keep_code(folder: Path) -> Path:
    """Copy the code for jobs that start later; return the folder of the copy."""
    contents = code_files()
    copy = folder / hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:12]
    if not copy.exists():
        partial_copy = copy.with_suffix(".partial")
        shutil.rmtree(partial_copy, ignore_errors=True)
        for name, content in contents.items():
            (partial_copy / name).parent.mkdir(parents=True, exist_ok=True)
            (partial_copy / name).write_text(content, encoding="utf-8")
        partial_copy.rename(copy)
    return copy
