"""The launcher of sweeps, for Hydra, which finds launchers in this folder alone.

Every point becomes a job with its composed configuration; what is finished already is not run again.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

logger = logging.getLogger(__name__)


@dataclass
class JobsConf:
    _target_: str = "hydra_plugins.launcher.JobLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="jobs", node=JobsConf, provider="pretraining")


class PointReturn(JobReturn):
    """What a sweeper gets of a point: its value, or the error that it raises when asked for one."""

    @property
    def return_value(self) -> Any:
        if self.status is JobStatus.FAILED:
            raise self._return_value
        return self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


class JobLauncher(Launcher):
    """Runs the points of a sweep as `launcher` in the configuration says, and waits for them."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of points; the returned values are rank 0's, in the order of the points."""
        from launch.sweep import Composed, run_points

        setup_globals()
        swept = self._swept(job_overrides)
        sweep_dir = Path(os.path.relpath(str(self.config.hydra.sweep.dir)))
        composed = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            fixed = sorted({key for key, _ in map(_parts, overrides) if key not in swept} | {"launcher", "name"})
            excluded = f"hydra.job.config.override_dirname.exclude_keys=[{','.join(map(_quoted, fixed))}]"
            cfg = self.hydra_context.config_loader.load_sweep_config(self.config, [*overrides, excluded])
            with read_write(cfg), open_dict(cfg):
                cfg.hydra.job.num = cfg.hydra.job.id = number
                run_dir = sweep_dir / str(OmegaConf.select(cfg, "hydra.sweep.subdir") or "")
                hydra = cfg.pop("hydra")
            label = " ".join(override for override in overrides if _parts(override)[0] in swept)
            composed.append(Composed(label, cfg, run_dir, hydra))
        returns = []
        outcomes = run_points(self.config.hydra.job.config_name, composed, sweep_dir)
        for overrides, point, outcome in zip(job_overrides, composed, outcomes, strict=True):
            result = PointReturn(overrides=list(overrides), cfg=point.cfg)
            result.return_value = outcome
            result.status = JobStatus.FAILED if isinstance(outcome, Exception) else JobStatus.COMPLETED
            returns.append(result)
        return returns

    def _swept(self, job_overrides: Sequence[Sequence[str]]) -> set[str]:
        """Give the keys that have several values, here or in the sweep that this batch is of."""
        lines = [*self.config.hydra.overrides.task]
        lines += [f"{key}={value}" for key, value in (self.config.hydra.sweeper.get("params") or {}).items()]
        swept = {o.key_or_group for o in OverridesParser.create().parse_overrides(lines) if o.is_sweep_override()}
        values: dict[str, set[str]] = {}
        for overrides in job_overrides:
            for key, value in map(_parts, overrides):
                values.setdefault(key, set()).add(value)
        return swept | {key for key, found in values.items() if len(found) > 1}


def _parts(override: str) -> tuple[str, str]:
    key, _, value = override.lstrip("+~").partition("=")
    return key, value


def _quoted(key: str) -> str:
    return f"'{key}'"
