"""`hydra/launcher=jobs`, the default: every point of a sweep is a job of its own, on this machine or on Slurm.

Hydra finds launchers in this folder alone.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from conf.schema import TrainConfig
from launch.sweep import SweepError, SweepPoint, folder_name, removed_if_unused, run_points, share_cores


@dataclass
class JobsConf:
    _target_: str = "hydra_plugins.launcher.JobLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="jobs", node=JobsConf, provider="pretraining")
OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)  # for hydra.sweep.subdir


class JobLauncher(Launcher):
    """Runs the points of a sweep where the group `launcher` decides, and waits for them."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of points; the values returned are rank 0's, in the order of the points."""
        from conf.cli import is_user_error
        from training.preflight import check_run

        with removed_if_unused(Path(self.config.hydra.sweep.dir)):
            setup_globals()
            swept = self._swept(job_overrides)
            points = [
                self._point(n, o, swept, len(job_overrides)) for n, o in enumerate(job_overrides, initial_job_idx)
            ]
            dry = {isinstance(point.config, TrainConfig) and point.config.dry_run.enabled for point in points}
            if len(dry) > 1:
                raise SweepError("dry_run.enabled must be the same at all points of a sweep")
            if True in dry:
                results = list(map(_run_dry, points))
            else:
                results = run_points(
                    points,
                    Path(os.path.relpath(self.config.hydra.sweep.dir)),
                    check=lambda point: check_run(point.config, point.run_dir, point.settings),
                    is_user_error=is_user_error,
                )
        return [
            JobReturn(
                overrides=overrides,
                status=JobStatus.FAILED if isinstance(result, Exception) else JobStatus.COMPLETED,
                _return_value=result,
            )
            for overrides, result in zip(job_overrides, results, strict=True)
        ]

    def _point(self, number: int, overrides: Sequence[str], swept: set[str], n_points: int) -> SweepPoint:
        """Compose and check one point; its folder is named after the keys that vary."""
        from conf.cli import checked, data_settings

        fixed = sorted({_key(override) for override in overrides} - swept | {"launcher", "name"})
        exclude = f"hydra.job.config.override_dirname.exclude_keys={fixed}"
        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, [*overrides, exclude])
        with read_write(cfg), open_dict(cfg):
            cfg.hydra.job.update(num=number, id=str(number))
            HydraConfig.instance().set_config(cfg.copy())
            run_dir = Path(os.path.relpath(cfg.hydra.sweep.dir)) / str(cfg.hydra.sweep.subdir or "")
            settings, named = data_settings(cfg.hydra), data_settings(cfg.hydra, "data.name", "data.path")
            del cfg["hydra"]
        config = share_cores(checked(cfg), n_points)
        other = run_dir if isinstance(config, TrainConfig) else named
        label = " ".join(override for override in overrides if _key(override) in swept)
        return SweepPoint(label, run_dir, config, (config, other), settings)

    def _swept(self, job_overrides: Sequence[Sequence[str]]) -> set[str]:
        """Return the keys that have several values, here or in the sweep that this batch is part of."""
        params = self.config.hydra.sweeper.get("params") or {}
        lines = [*self.config.hydra.overrides.task, *(f"{key}={value}" for key, value in params.items())]
        swept = {o.key_or_group for o in OverridesParser.create().parse_overrides(lines) if o.is_sweep_override()}
        keys = Counter(map(_key, {override for overrides in job_overrides for override in overrides}))
        return swept | {key for key, n_values in keys.items() if n_values > 1}


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _run_dry(point: SweepPoint) -> None:
    """Print the report of a point's dry run; no job is started for it."""
    from dry_run.run import run_dry_run

    assert isinstance(point.config, TrainConfig)
    if point.label:
        print(f"\n== {point.label}", flush=True)
    run_dry_run(point.config)
