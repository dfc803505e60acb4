"""A sweep: what of it is missing is run, and what came out is told, whole."""

import hashlib
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from conf.cli import SweepError, data_settings, is_user_error, told_once
from conf.schema import PrepareConfig, TrainConfig, to_config
from corpus.config import DataError
from launch.config import LauncherConfig, Where
from launch.ranks import nproc_per_node
from parallel.config import Device, ParallelConfig, ParallelError
from tracking.run_folder import SWEEP_LOCK, changed_keys, is_free_key, locked
from tracking.status import crashed_the_same_way_twice, note_end, note_queued, read_status
from training.config import CheckpointError
from training.preflight import refuse_or_need

CODE = Path(__file__).parent.parent
ROOMS = ("conf", "corpus", "data", "dry_run", "hydra_plugins", "launch", "model", "parallel", "tracking", "training")

logger = logging.getLogger(__name__)


class Composed(NamedTuple):
    """A point of a sweep: what is told of it, its configuration, its folder, and Hydra's own configuration."""

    label: str
    cfg: DictConfig
    run_dir: Path
    hydra: DictConfig


def run_points(command: str, points: Sequence[Composed], sweep_dir: Path) -> list[float | Exception | None]:
    """Run a command at points and give rank 0's value, or an error, of each.

    The value of a point that was given up is infinite. Raises `SweepError` before the first one starts if any cannot.
    Dry runs are no jobs: they are done here.
    """
    if any(_is_dry(point.cfg) for point in points):
        return [_rehearse(point.label, point.cfg) for point in points]
    checked = _checked(points)
    from launch.jobs import Job, Outcome, Point, run_jobs
    from tracking.compare import compare
    from tracking.logs import screen

    wanted, begun, outcomes = [], [], {}
    starts_here = any(config.launcher.where is Where.local and needed is not None for _, config, _, needed in checked)
    with screen(), locked(sweep_dir, name=SWEEP_LOCK) if starts_here else nullcontext():
        for (label, _, run_dir, hydra), config, run_config, needed in checked:
            if needed is None:
                outcomes[run_dir] = Outcome("finished", _value(run_dir, read_status(run_dir)["valid_loss"]))
                logger.info("%s already: %s", read_status(run_dir)["state"], run_dir)
                continue
            _share_cores(config, len(points))
            if isinstance(config, TrainConfig):
                parallel, args = config.parallel, (config, run_config, run_dir)
            else:
                parallel = ParallelConfig(device=Device.cpu, nproc_per_node=1)
                args = (config, data_settings(hydra, "data.name", "data.path"))
            again = partial(crashed_the_same_way_twice, run_dir)
            job = Job(f"{command}:work", args, parallel, is_user_error, config.launcher, hopeless=again)
            wanted.append(Point(label, run_dir, config.launcher, run_config, job, needed))

        def begin(point: Point) -> None:
            begun.append(point)
            if command == "train":
                note_queued(point.run_dir, point.described)

        def report(point: Point, outcome: Outcome) -> None:
            outcomes[point.run_dir] = outcome
            if outcome.state == "finished":
                loss = outcome.value = _value(point.run_dir, outcome.value)
                told = f", validation loss {loss:.4f}" if isinstance(loss, float) and loss < math.inf else ""
                state = "given up" if loss == math.inf else "finished"
                logger.info("%s: %s%s", state, point.label or point.run_dir, told)
            else:
                note_end(point.run_dir, outcome.state, outcome.reason)
                print(f"error: {point.label or point.run_dir} {outcome.state}: {outcome.reason}", file=sys.stderr)

        try:
            if wanted:
                run_jobs(wanted, sweep_dir.resolve() / ".jobs", keep_code(sweep_dir / ".code"), report, begin)
        except BaseException:
            for point in begun:
                note_end(point.run_dir, "stopped", "")
            raise
        if command == "train" and any(point.label for point in points):
            compare(sweep_dir, show=True)
    unfinished = [p.label or str(p.run_dir) for p in points if outcomes[p.run_dir].state != "finished"]
    told = SweepError(f"{len(unfinished)} of {len(points)} points did not finish: {', '.join(unfinished)}")
    ends = [outcomes[point.run_dir] for point in points]
    return [end.value if end.state == "finished" else told for end in ends]


def _value(run_dir: Path, valid_loss: float | None) -> float | None:
    return math.inf if read_status(run_dir).get("state") == "given up" else valid_loss


def _is_dry(cfg: DictConfig) -> bool:
    return bool(OmegaConf.select(cfg, "dry_run.enabled"))


def _rehearse(label: str, cfg: DictConfig) -> None:
    """Print what a point would be; raises `SweepError` if it is no dry run, as its siblings are."""
    from dry_run.run import run_dry_run

    if not _is_dry(cfg):
        raise SweepError(f"dry_run ({label}) must be the same at all points of a sweep")
    if label:
        print(f"\n== {label}", flush=True)
    run_dry_run(to_config(cfg))


def _checked(
    points: Sequence[Composed],
) -> list[tuple[Composed, Any, dict[str, Any], list[tuple[Path, str]] | None]]:
    """Give every point with its configuration, typed and plain, and what else than its folder nodes of Slurm must see.

    That is None of a point that has finished. Raises `SweepError` with everything that keeps points from starting.
    """
    checked = []
    problems: dict[str, list[str]] = {}
    folders: dict[Path, str] = {}
    for point in points:
        label, cfg, run_dir, hydra = point
        other = folders.setdefault(run_dir, label)
        if other != label:
            raise SweepError(f"{other} and {label} would share {run_dir}; let hydra.sweep.subdir tell them apart")
        config = to_config(cfg)
        run_config: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
        needed = None
        try:
            if not is_finished(run_dir, run_config):
                needed = refuse_or_need(config, run_config, run_dir, data_settings(hydra))
        except (DataError, CheckpointError, ParallelError) as error:
            problems.setdefault(str(error), []).append(label)
        checked.append((point, config, run_config, needed))
    if problems:
        raise SweepError("\n".join(told_once(problems, len(points))))
    return checked


def _share_cores(config: Any, n_points: int) -> None:
    """Leave points that run on this machine at one time a share of its cores each."""
    launcher: LauncherConfig = config.launcher
    share = len(os.sched_getaffinity(0)) // (launcher.parallel_jobs or n_points)
    if launcher.where is not Where.local:
        return
    if isinstance(config, PrepareConfig):
        config.workers = config.workers or max(1, share)
    else:
        ranks = nproc_per_node(config.parallel, launcher)
        config.parallel.threads = config.parallel.threads or max(1, share // ranks)


def is_finished(run_dir: Path, run_config: dict[str, Any]) -> bool:
    """Say whether a run folder holds the end of this very run, or the place where the same rule gave it up."""
    status = read_status(run_dir)
    if status.get("state") not in ("finished", "given up"):
        return False
    if status["state"] == "given up" and status["config"]["early_stop"] != run_config["early_stop"]:
        return False
    changed = [key for key, _, _ in changed_keys(status["config"], run_config) if not is_free_key(key)]
    return not changed


def keep_code(folder: Path) -> Path:
    """Copy the code and conf/, as they are now, for jobs that start later; gives the copy's folder."""
    files = sorted(path for room in ROOMS for path in (CODE / room).rglob("*") if path.suffix in (".py", ".yaml"))
    files += sorted(CODE.glob("*.py"))
    contents = {str(path.relative_to(CODE)): path.read_text() for path in files}
    copy = folder / hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:12]
    if not copy.exists():
        partial = copy.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        for name, content in contents.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(content)
        partial.rename(copy)
    return copy
