"""Hydra's plugins, which it finds in this folder only: sweeps as jobs, and a search.

With `hydra/launcher=jobs`, the default, every point of a sweep is a job, on this machine or on Slurm.
`hydra/sweeper=optuna` is a resumable search that minimises `objective`, the validation loss or any metric.

    python train.py -m hydra/sweeper=optuna hydra.sweeper.n_trials=20 'optimizer.lr=tag(log, interval(1e-4, 1e-2))'

Hydra's plugin of this name needs Optuna 2, whose storage breaks with current SQLAlchemy.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from conf.cli import checked, data_settings
from conf.schema import TrainConfig, to_plain
from launch.sweep import SweepError, folder_name, removed_if_unused, run_points, share_cores, tried
from parallel.config import Device, ParallelConfig
from tracking.run_folder import changed_keys, is_free_key
from training.preflight import check_run

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

    from launch.jobs import Point


@dataclass
class SearchConf:
    _target_: str = "hydra_plugins.sweeps.OptunaSweeper"
    n_trials: int = 20  # in total, including earlier commands
    n_jobs: int = 1  # trials that run at once
    seed: int = 0  # of Optuna's TPE sampler
    params: dict[str, str] = field(default_factory=dict)  # search space, as on the command line


JOBS = {"_target_": "hydra_plugins.sweeps.JobLauncher"}
ConfigStore.instance().store(group="hydra/launcher", name="jobs", node=JOBS, provider="pretraining")
ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=SearchConf, provider="pretraining")
OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)  # for hydra.sweep.subdir


class JobLauncher(Launcher):
    """Runs the points of a sweep as the `launcher` group says, and waits for them."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of points; return rank 0's values in the order of the points."""
        with removed_if_unused(Path(self.config.hydra.sweep.dir)):
            setup_globals()
            hydra = self.config.hydra
            params = [f"{key}={values}" for key, values in (hydra.sweeper.get("params") or {}).items()]
            task = OverridesParser.create().parse_overrides([*params, *hydra.overrides.task])
            varies = {override.key_or_group: override.is_sweep_override() for override in task}  # the last one wins
            fixed = {key for key in varies if not varies[key]}
            n_points, steps = len(job_overrides), []
            for number, overrides in enumerate(job_overrides, initial_job_idx):
                typed = (override.lstrip("+") for override in overrides)
                label = " ".join(o for o in typed if o.lstrip("~").partition("=")[0] not in fixed)
                steps.append((label, partial(self._point, number, overrides, label, fixed, n_points)))
            points, problems = tried(steps, n_points)
            if problems:
                raise SweepError("\n".join(problems))
            dry = [point.described.get("dry_run", {}).get("enabled", False) for point in points]
            if any(dry) and not all(dry):
                raise SweepError("dry_run.enabled must be the same at all points of a sweep")
            if all(dry):
                results = list(map(_run_dry, points))
            else:
                results = run_points(points, Path(os.path.relpath(self.config.hydra.sweep.dir)))
        states = [JobStatus.FAILED if isinstance(r, Exception) else JobStatus.COMPLETED for r in results]
        return [JobReturn(o, status=s, _return_value=r) for o, s, r in zip(job_overrides, states, results, strict=True)]

    def _point(self, number: int, overrides: Sequence[str], label: str, fixed: set[str], n_points: int) -> "Point":
        """Compose and check one point; its folder is named after the keys that vary."""
        from launch.jobs import Job, Point

        exclude = f"hydra.job.config.override_dirname.exclude_keys={sorted(fixed | {'launcher', 'name'})}"
        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, [*overrides, exclude])
        with read_write(cfg), open_dict(cfg):
            cfg.hydra.job.update(num=number, id=str(number))
            HydraConfig.instance().set_config(cfg.copy())
            run_dir = Path(os.path.relpath(cfg.hydra.sweep.dir)) / str(cfg.hydra.sweep.subdir or "")
            settings = data_settings(cfg.hydra)
            del cfg["hydra"]
        config = share_cores(checked(cfg), n_points)
        if isinstance(config, TrainConfig):
            job = Job("train:work", (config, run_dir), run_dir, config.parallel, config.launcher)
        else:
            one_process = ParallelConfig(device=Device.cpu, nproc_per_node=1)
            job = Job("prepare_data:work", (config, settings), run_dir, one_process, config.launcher)
        return Point(label, job, to_plain(config), check=partial(check_run, config, run_dir, settings))


def _run_dry(point: "Point") -> None:
    """Print the dry run of a point, without a job."""
    from dry_run.run import run_dry_run

    if point.label:
        print(f"\n== {point.label}", flush=True)
    run_dry_run(point.job.args[0])


class OptunaSweeper(Sweeper):
    """Runs an Optuna study that is stored in the sweep's folder."""

    def __init__(self, n_trials: int, n_jobs: int, seed: int, params: DictConfig) -> None:
        self.n_trials, self.n_jobs, self.seed, self.params = n_trials, n_jobs, seed, params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.folder = Path(str(config.hydra.sweep.dir))
        self.jobs = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until there are `n_trials`; raise `SweepError` if one failed or the search cannot run."""
        overrides = OverridesParser.create().parse_overrides([*_settings(self.params), *arguments])
        try:
            space = {o.get_key_element(): distribution(o) for o in overrides if o.is_sweep_override()}
            study = self._study()
        except ModuleNotFoundError:
            raise SweepError("hydra/sweeper=optuna needs Optuna: pip install -r requirements-search.txt") from None
        from optuna.trial import TrialState

        fixed = {o.get_key_element(): o.input_line or "" for o in overrides if not o.is_sweep_override()}
        if not space:
            raise SweepError("hydra/sweeper=optuna has nothing to vary; pass, say, optimizer.lr='interval(1e-4, 1e-2)'")
        other = f"{self.folder} has a search with other settings; pass another name="
        if changed := self._changed_settings(study, list(fixed.values())):
            raise SweepError(f"{other}: {', '.join(changed)}")
        for trial in study.get_trials(states=(TrialState.RUNNING,)):  # of an interrupted command
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params, user_attrs={"again": trial.number})
        failed: list[str] = []
        left = self.n_trials - len(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)))
        while left > 0:
            try:
                trials = [study.ask(space) for _ in range(min(self.n_jobs, left))]
            except ValueError as error:  # other choices than before
                raise SweepError(f"{other}: {error}") from None
            left -= len(trials)
            points = [[*fixed.values(), *_settings(trial.params)] for trial in trials]
            returns = self.jobs.launch(points, initial_job_idx=trials[0].number)
            for trial, result in zip(trials, returns, strict=True):
                value = result.return_value if result.status is JobStatus.COMPLETED else None
                if value == math.inf:  # stopped by early_stop
                    study.tell(trial, state=TrialState.PRUNED)
                elif value is None or math.isnan(value):
                    study.tell(trial, state=TrialState.FAIL)
                    failed.append(" ".join(_settings(trial.params)))
                else:
                    study.tell(trial, value)
        if done := study.get_trials(states=(TrialState.COMPLETE,)):
            print(f"best of {len(done)} trials: {study.best_value:.4f} at {' '.join(_settings(study.best_params))}")
        if failed:
            what = getattr(self.config, "objective", "result")
            raise SweepError(f"{len(failed)} of {self.n_trials} trials have no {what}: {'; '.join(failed)}")

    def _study(self) -> "Study":
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        logging.getLogger("optuna").propagate = False
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, self.folder / "multirun.yaml")
        storage = JournalStorage(JournalFileBackend(str(self.folder / "search.journal")))
        study = optuna.create_study(storage=storage, study_name=self.folder.name, load_if_exists=True)
        # A resumed search must not repeat the first points.
        study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(study.trials))
        return study

    def _changed_settings(self, study: "Study", fixed: list[str]) -> list[str]:
        """Return how the fixed settings differ from those of earlier trials, which the study stores."""
        assert self.hydra_context is not None and self.config is not None
        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, fixed)
        settings: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
        del settings["hydra"]
        before = study.user_attrs.get("settings", settings)
        study.set_user_attr("settings", before)
        changed = changed_keys(before, settings)
        return [f"{key} ({old}, now {new})" for key, old, new in changed if key == "objective" or not is_free_key(key)]


def distribution(override: Override) -> "BaseDistribution":
    """Return the values of an override as an Optuna distribution: an interval or a choice."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if not isinstance(value, IntervalSweep):
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    start, end, log = value.start, value.end, "log" in value.tags
    if isinstance(start, int) and isinstance(end, int):
        return IntDistribution(start, end, log=log)
    return FloatDistribution(float(start or 0), float(end or 0), log=log)


def _settings(params: Mapping[Any, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in params.items()]
