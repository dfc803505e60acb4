"""A sweep: what of it is missing is run, and what came out is told, whole."""

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from conf.command import SweepError, is_sentence
from conf.schema import TrainConfig, to_config
from data.config import DataError, refuse_missing
from parallel.config import Device, ParallelConfig
from training.run_folder import changed_keys, is_free_key
from training.status import crashed_the_same_way_twice, note_death, note_queued, read_status

CODE = Path(__file__).parent.parent
ROOMS = ("assembly", "conf", "model", "parallel", "data", "training", "hydra_plugins")

logger = logging.getLogger(__name__)


def run_points(
    command: str, points: Sequence[tuple[str, DictConfig, Path]], sweep_dir: Path
) -> list[float | Exception | None]:
    """Run a command at points (what is told, configuration, folder) and give rank 0's value, or an error, of each."""
    from parallel.jobs import Job, Outcome, Point, run_jobs
    from training.compare import compare
    from training.logs import screen

    wanted, outcomes = [], {}
    with screen():
        refuse_missing_of_all([(label, to_config(cfg)) for label, cfg, _ in points])
        for label, cfg, run_dir in points:
            config = to_config(cfg)
            run_config: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
            if is_finished(run_dir, run_config):
                outcomes[run_dir] = Outcome("finished", read_status(run_dir)["valid_loss"])
                logger.info("finished already: %s", run_dir)
                continue
            parallel, args = ParallelConfig(device=Device.cpu, local_processes=1), (config,)
            if isinstance(config, TrainConfig):
                note_queued(run_dir, run_config)
                parallel, args = config.parallel, (config, run_config, run_dir)
            again = partial(crashed_the_same_way_twice, run_dir)
            job = Job(f"{command}:work", args, parallel, is_sentence, config.launcher, hopeless=again)
            wanted.append(Point(label, run_dir, config.launcher, run_config, job))

        def report(point: Point, outcome: Outcome) -> None:
            outcomes[point.run_dir] = outcome
            if outcome.state == "finished":
                value = f", validation loss {outcome.value:.4f}" if isinstance(outcome.value, float) else ""
                logger.info("finished: %s%s", point.label or point.run_dir, value)
            else:
                note_death(point.run_dir, outcome.reason)
                print(f"error: {point.label or point.run_dir} {outcome.state}: {outcome.reason}", file=sys.stderr)

        if wanted:
            run_jobs(wanted, sweep_dir.resolve() / ".jobs", keep_code(sweep_dir / ".code"), report)
        if command == "train" and any(label for label, _, _ in points):
            compare(sweep_dir, tell=True)
    unfinished = [label or str(run_dir) for label, _, run_dir in points if outcomes[run_dir].state != "finished"]
    told = SweepError(f"{len(unfinished)} of {len(points)} points did not finish: {', '.join(unfinished)}")
    ends = [outcomes[run_dir] for _, _, run_dir in points]
    return [end.value if end.state == "finished" else told for end in ends]


def refuse_missing_of_all(points: list[tuple[str, Any]]) -> None:
    """Raise `SweepError`, a line for each point whose data are not there, before any of them is started."""
    missing = []
    for label, config in points:
        try:
            if isinstance(config, TrainConfig) and not config.dry_run.enabled:
                refuse_missing(config.data)
        except DataError as error:
            missing.append(f"{error} (at {label})")
    if missing:
        raise SweepError("\n".join(missing))


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
