"""hydra/sweeper=optuna: a search that minimises the validation loss and can be continued, for Hydra.

    python train.py -m hydra/sweeper=optuna hydra.sweeper.n_trials=20 'optimizer.lr=tag(log, interval(1e-4, 1e-2))'

Hydra's own plugin of this name holds Optuna at version 2.10, whose storage breaks with today's SQLAlchemy.
"""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


@dataclass
class SearchConf:
    _target_: str = "hydra_plugins.sweeper.OptunaSweeper"
    n_trials: int = 20  # in all, those of earlier commands included
    n_jobs: int = 1  # trials that are asked for and run together
    seed: int = 0  # of the sampler, which is Optuna's TPE
    params: dict[str, str] = field(default_factory=dict)  # the space, as on the command line


ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=SearchConf, provider="pretraining")


class OptunaSweeper(Sweeper):
    """Asks Optuna for points and tells it what came out; the study lives in the sweep's folder."""

    def __init__(self, n_trials: int, n_jobs: int, seed: int, params: DictConfig) -> None:
        self.n_trials, self.n_jobs, self.seed, self.params = n_trials, n_jobs, seed, params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.sweep_dir = Path(str(config.hydra.sweep.dir))
        self.jobs = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run trials until there are `n_trials`; raises `SweepError` if one failed, or none can be asked for."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
        from optuna.trial import TrialState

        from conf.cli import SweepError

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        logging.getLogger("optuna").propagate = False
        lines = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        overrides = OverridesParser.create().parse_overrides(lines)
        space = {o.get_key_element(): distribution(o) for o in overrides if o.is_sweep_override()}
        fixed = {o.get_key_element(): o.input_line or "" for o in overrides if not o.is_sweep_override()}
        folder = self.sweep_dir
        for key in ("n_trials", "n_jobs"):
            if getattr(self, key) < 1:
                raise SweepError(f"hydra.sweeper.{key} ({getattr(self, key)}) must be at least 1")
        if not space:
            raise SweepError("hydra/sweeper=optuna has nothing to vary; pass optimizer.lr='interval(1e-4, 1e-2)', say")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "multirun.yaml").write_text(OmegaConf.to_yaml(self.config))
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / "search.journal"))),
            study_name=folder.name,
            sampler=optuna.samplers.TPESampler(seed=self.seed + _n_told(folder)),
            load_if_exists=True,
        )
        changed = [*self._changed_settings(study, list(fixed.values())), *changed_choices(study, space)]
        if changed:
            told = ", ".join(changed)
            raise SweepError(f"the search in {folder} was begun with other settings: {told}; pass another name=")
        for trial in study.get_trials(states=(TrialState.RUNNING,)):  # of a command that was interrupted
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params, user_attrs={"again": trial.number})
        failed: list[str] = []
        left = self.n_trials - len(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)))
        while left > 0:
            trials = [study.ask(space) for _ in range(min(self.n_jobs, left))]
            left -= len(trials)
            points = [[*fixed.values(), *(f"{key}={trial.params[key]}" for key in space)] for trial in trials]
            returns = self.jobs.launch(points, initial_job_idx=trials[0].number)
            for trial, result in zip(trials, returns, strict=True):
                value = result._return_value if result.status is JobStatus.COMPLETED else None
                if isinstance(value, float) and math.isfinite(value):
                    study.tell(trial, value)
                elif value == math.inf:  # early_stop gave it up
                    study.tell(trial, state=TrialState.PRUNED)
                else:
                    study.tell(trial, state=TrialState.FAIL)
                    failed.append(" ".join(f"{key}={trial.params[key]}" for key in space))
        done = study.get_trials(states=(TrialState.COMPLETE,))
        if done:
            print(f"best of {len(done)} trials: {study.best_value:.4f} at {_named(study.best_params)}")
        if failed:
            raise SweepError(f"{len(failed)} of {self.n_trials} trials gave no loss: {'; '.join(failed)}")
        return None

    def _changed_settings(self, study: Any, fixed: list[str]) -> list[str]:
        """Say in what the trials so far differ from those to come, beside what varies; the study keeps it."""
        from tracking.run_folder import changed_keys, is_free_key

        assert self.hydra_context is not None and self.config is not None
        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, fixed)
        settings: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
        del settings["hydra"]
        before = study.user_attrs.get("settings", settings)
        study.set_user_attr("settings", before)
        changed = changed_keys(before, settings)
        return [f"{key} ({old}, now {new})" for key, old, new in changed if not is_free_key(key)]


def changed_choices(study: Any, space: dict[str, Any]) -> list[str]:
    """Say which keys of a space Optuna cannot go on with: their choices, or their kind, are others than before."""
    from optuna.distributions import check_distribution_compatibility

    changed = {}
    for trial in study.trials:
        for key, before in trial.distributions.items():
            try:
                check_distribution_compatibility(before, space.get(key, before))
            except ValueError:
                changed[key] = f"{key} ({_values(before)}, now {_values(space[key])})"
    return list(changed.values())


def _values(of: Any) -> str:
    return ",".join(map(str, of.choices)) if hasattr(of, "choices") else f"interval({of.low}, {of.high})"


def distribution(override: Override) -> Any:
    """Give an override's values as Optuna has them: an interval, or a choice."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if not isinstance(value, IntervalSweep):
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    assert value.start is not None and value.end is not None
    log = "log" in value.tags
    if isinstance(value.start, int) and isinstance(value.end, int):
        return IntDistribution(value.start, value.end, log=log)
    return FloatDistribution(float(value.start), float(value.end), log=log)


def _named(params: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in params.items())


def _n_told(folder: Path) -> int:
    """The length of the study so far, so that a continued search draws other points than it began with."""
    journal = folder / "search.journal"
    return len(journal.read_text().splitlines()) if journal.exists() else 0
