"""`hydra/launcher=jobs`, the default: every point of a sweep is a job, on this machine or on Slurm.

Hydra finds plugins in this folder only.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from conf.cli import checked, data_settings
from conf.schema import TrainConfig, to_plain
from launch.sweep import SweepError, folder_name, removed_if_unused, run_points, share_cores, tried
from parallel.config import Device, ParallelConfig
from training.preflight import check_run

if TYPE_CHECKING:
    from launch.jobs import Point


JOBS = {"_target_": "hydra_plugins.launcher.JobLauncher"}
ConfigStore.instance().store(group="hydra/launcher", name="jobs", node=JOBS, provider="pretraining")
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
