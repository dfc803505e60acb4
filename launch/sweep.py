"""Run the points of a sweep that are not finished yet, each as a job, and compare what came out."""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from conf.schema import PrepareConfig, TrainConfig, to_plain
from launch.config import Where
from launch.ranks import nproc_per_node
from parallel.config import Device, ParallelConfig
from tracking.metrics_file import last_value
from tracking.run_folder import SWEEP_LOCK, changed_keys, is_free_key, locked
from tracking.status import crashed_the_same_way_twice, note_end, note_queued, read_status

CODE = Path(__file__).parent.parent

logger = logging.getLogger(__name__)


class SweepError(Exception):
    """Points of a sweep that cannot start or did not finish."""


@dataclass(frozen=True)
class SweepPoint:
    """A point of a sweep, checked and ready to run; `label` is what varies, `args` what the command's work takes."""

    label: str
    run_dir: Path
    config: TrainConfig | PrepareConfig
    args: tuple
    settings: str = ""  # those by which another command finds its data


# Raises a user error if a point cannot start; returns the paths that nodes of Slurm must see, each with an error or "".
Check = Callable[[SweepPoint], list[tuple[Path, str]]]


def run_points(
    points: Sequence[SweepPoint],
    sweep_dir: Path,
    *,
    check: Check,
    is_user_error: Callable[[BaseException], bool],
) -> list[float | SweepError | None]:
    """Run the command's `work` at each point; return rank 0's values, or errors.

    The value of a point that was given up is infinite. Raise `SweepError` before the first one starts if any cannot.
    """
    trains = isinstance(points[0].config, TrainConfig)
    missing = [point for point in points if not is_finished(point.run_dir, to_plain(point.config))]
    needed = _needed(missing, len(points), check, is_user_error)
    from launch.jobs import Job, Outcome, Point, run_jobs
    from tracking.compare import compare
    from tracking.logs import screen

    jobs, begun, outcomes = [], [], {}
    starts_here = any(point.config.launcher.where is Where.local and point.run_dir in needed for point in points)
    with screen(), locked(sweep_dir, name=SWEEP_LOCK) if starts_here else nullcontext():
        for point in points:
            run_dir, launcher = point.run_dir, point.config.launcher
            if run_dir not in needed:
                objective = getattr(point.config, "objective", "")
                outcomes[run_dir] = Outcome("finished", _value(run_dir, last_value(run_dir, objective)))
                logger.info("%s already: %s", read_status(run_dir)["state"], run_dir)
                continue
            one_process = ParallelConfig(device=Device.cpu, nproc_per_node=1)
            parallel = point.config.parallel if isinstance(point.config, TrainConfig) else one_process
            work = "train:work" if trains else "prepare_data:work"
            hopeless = partial(crashed_the_same_way_twice, run_dir)
            job = Job(work, point.args, parallel, is_user_error, launcher, hopeless=hopeless)
            jobs.append(Point(point.label, run_dir, launcher, to_plain(point.config), job, needed[run_dir]))

        def begin(point: Point) -> None:
            begun.append(point)
            if trains:
                note_queued(point.run_dir, point.described)

        def report(point: Point, outcome: Outcome) -> None:
            outcomes[point.run_dir] = outcome
            if outcome.state == "finished":
                loss = outcome.value = _value(point.run_dir, outcome.value)
                name = point.described.get("objective", "").replace("valid/loss", "validation loss")
                shown = f", {name} {loss:.4f}" if isinstance(loss, float) and loss != math.inf else ""
                logger.info("%s: %s%s", "given up" if loss == math.inf else "finished", point.name, shown)
            else:
                note_end(point.run_dir, outcome.state, outcome.reason)
                print(f"error: {point.name} {outcome.state}: {outcome.reason}", file=sys.stderr)

        try:
            if jobs:
                run_jobs(jobs, sweep_dir.resolve() / ".jobs", keep_code(sweep_dir / ".code"), report, begin)
        except BaseException:
            for point in begun:
                note_end(point.run_dir, "stopped", "")
            raise
        if trains and any(point.label for point in points):
            compare(sweep_dir, show=True)
    ends = [outcomes[point.run_dir] for point in points]
    failed = [p.label or str(p.run_dir) for p, end in zip(points, ends, strict=True) if end.state != "finished"]
    error = SweepError(f"{len(failed)} of {len(points)} points did not finish: {', '.join(failed)}")
    return [end.value if end.state == "finished" else error for end in ends]


def _value(run_dir: Path, valid_loss: float | None) -> float | None:
    return math.inf if read_status(run_dir).get("state") == "given up" else valid_loss


def _needed(
    points: Sequence[SweepPoint], n_points: int, check: Check, is_user_error: Callable[[BaseException], bool]
) -> dict[Path, list[tuple[Path, str]]]:
    """Return what nodes of Slurm must see for each point, by its folder; raise `SweepError` if a point cannot start."""
    problems: dict[str, list[str]] = {}
    needed: dict[Path, list[tuple[Path, str]]] = {}
    for point in points:
        if point.run_dir in needed:
            raise SweepError(f"points share {point.run_dir}; name each value once, or set hydra.sweep.subdir")
        try:
            needed[point.run_dir] = check(point)
        except Exception as error:
            if not is_user_error(error):
                raise
            needed[point.run_dir] = []
            problems.setdefault(str(error), []).append(point.label)
    if problems:
        raise SweepError("\n".join(merge_problems(problems, n_points)))
    return needed


def merge_problems(problems: dict[str, list[str]], n_points: int) -> list[str]:
    """Return every problem once, with the points that have it unless all do."""
    merged = []
    for problem, labels in problems.items():
        others = f" and {len(labels) - 1} other points" if len(labels) > 1 else ""
        merged.append(problem if len(labels) == n_points else f"{problem} (at {labels[0]}{others})")
    return merged


def share_cores(config: TrainConfig | PrepareConfig, n_points: int) -> TrainConfig | PrepareConfig:
    """Return the configuration of one of several points that run on this machine together, with its share of cores."""
    launcher = config.launcher
    share = len(os.sched_getaffinity(0)) // (launcher.parallel_jobs or n_points)
    if launcher.where is not Where.local:
        return config
    if isinstance(config, PrepareConfig):
        return replace(config, workers=config.workers or max(1, share))
    threads = config.parallel.threads or max(1, share // nproc_per_node(config.parallel, launcher))
    return replace(config, parallel=replace(config.parallel, threads=threads))


def is_finished(run_dir: Path, run_config: dict[str, Any]) -> bool:
    """Return whether a run folder holds the end of this very run, or the place where the same rule gave it up."""
    status = read_status(run_dir)
    given_up = status.get("state") == "given up" and status["config"]["early_stop"] == run_config["early_stop"]
    if not given_up and status.get("state") != "finished":
        return False
    return all(is_free_key(key) for key, _, _ in changed_keys(status["config"], run_config))


def folder_name(overrides: str) -> str:
    """Return a point's settings as one folder's name; if slashes or its length had to change, with a hash."""
    bare = overrides.translate({ord(sign): None for sign in "'\"\\"})
    name = re.sub(r"[/\x00-\x1f]", "_", bare)
    if name == bare and len(os.fsencode(name)) <= 255:
        return name
    return os.fsencode(name)[:200].decode(errors="ignore") + "-" + hashlib.sha256(bare.encode()).hexdigest()[:8]


@contextmanager
def removed_if_unused(folder: Path) -> Iterator[None]:
    """Remove the folder of a run or sweep that did not start: it holds only what Hydra wrote."""
    try:
        yield
    finally:
        if {path.name for path in folder.glob("*")} in ({".hydra"}, {"multirun.yaml"}):
            with suppress(OSError):
                shutil.rmtree(folder)
                os.removedirs(folder.parent)  # and those above it that are empty


def keep_code(folder: Path) -> Path:
    """Copy the code and conf/, as they are now, for jobs that start later; return the copy's folder."""
    rooms = {path.parent for path in CODE.glob("*/__init__.py")} | {CODE / "hydra_plugins"}
    rooms -= {CODE / "tests", CODE / "benchmarks"}
    files = [
        *CODE.glob("*.py"),
        *(path for room in rooms for kind in ("py", "yaml") for path in room.rglob(f"*.{kind}")),
    ]
    contents = {str(path.relative_to(CODE)): path.read_text(encoding="utf-8") for path in sorted(files)}
    copy = folder / hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:12]
    if not copy.exists():
        partial_copy = copy.with_suffix(".partial")
        shutil.rmtree(partial_copy, ignore_errors=True)
        for name, content in contents.items():
            (partial_copy / name).parent.mkdir(parents=True, exist_ok=True)
            (partial_copy / name).write_text(content, encoding="utf-8")
        partial_copy.rename(copy)
    return copy
