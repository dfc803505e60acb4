"""Train a model: python train.py model=7b data=pile_small; README.md lists every group.

Imports no torch before the configuration has been checked.
"""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # no traceback on Ctrl-C during imports
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from hydra.core.hydra_config import HydraConfig

from conf.cli import data_settings, run
from conf.schema import TrainConfig, to_plain
from launch.ranks import launch
from launch.sweep import removed_if_unused
from training.preflight import check_run

if TYPE_CHECKING:
    from parallel.mesh import Mesh
    from training.loop import Periodic
    from training.stop import StopRequest


def main(config: TrainConfig) -> float | None:
    run_dir = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
    with removed_if_unused(run_dir):
        if config.dry_run.enabled:
            from dry_run.run import run_dry_run

            return run_dry_run(config)
        check_run(config, run_dir, data_settings(HydraConfig.get()))
        return launch(work, config, run_dir, config=config.parallel)


def work(config: TrainConfig, run_dir: Path) -> float | None:
    """Run one rank; return the run's `objective`, or after a stop exit with the signal's code."""
    from launch.slurm import requeue_slurm_job
    from parallel.mesh import distributed
    from tracking.alerts import alerts
    from tracking.heartbeat import FOLDER, Heartbeat
    from tracking.logs import log_to
    from tracking.run_folder import locked
    from tracking.status import Status
    from training.out_of_memory import explain_oom
    from training.stop import StopRequest
    from training.stragglers import aborting_collectives, expire_collectives, pending_collective

    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # it aborts the process; the heartbeat raises
    late_s = config.parallel.step_timeout_s / 2
    with (
        distributed(config.parallel) as mesh,
        aborting_collectives(),
        locked(run_dir, mesh.rank),
        log_to(run_dir, mesh.rank),
        alerts(config.alerts, run_dir),
    ):
        with (
            Status(run_dir, to_plain(config), rank=mesh.rank, ranks=mesh.world_size) as status,
            StopRequest(mesh) as stop,
            Heartbeat(
                run_dir,
                mesh.rank,
                lambda: stop.agreements,
                late_s=late_s,
                pending=pending_collective,
                expire=lambda: expire_collectives(mesh.device, run_dir / FOLDER / f"nccl_trace_rank_{mesh.rank}"),
            ),
            explain_oom(),
        ):
            objective = train(config, mesh, run_dir, stop)
            more = stop.summary() | ({"reason": "profile=true: only some steps are run"} if config.profile else {})
            step, given_up = stop.saved_step, stop.given_up
            status.end(objective, stopped=bool(stop), given_up=given_up, saved_step=step, **more)
        if stop.for_a_requeue:
            requeue_slurm_job(run_dir, rank=mesh.rank, max_requeues=config.launcher.max_requeues)
    if stop and not stop.given_up:
        sys.exit(stop.exit_code)
    return objective


def train(
    config: TrainConfig, mesh: "Mesh", run_dir: Path, stop: "StopRequest", *, periodic: "Sequence[Periodic]" = ()
) -> float | None:
    """Run the remaining steps and return the run's `objective`; `periodic` actions run after each step."""
    from data.dataset import open_corpus
    from tracking.loggers import Loggers
    from tracking.metrics_file import last_value, truncate_metrics
    from training.agreement import check_same_run
    from training.describe import describe, save_run_inputs
    from training.loop import Run, loop
    from training.profile import profile_steps
    from training.ranks import Ranks
    from training.report import StepReport
    from training.resume import RunCheckpoints
    from training.setup import build_engine, build_model, build_throughput, build_train_batches, lr_schedule
    from training.state import TrainState

    # Data first: it is the most frequent error, and opens quickly.
    run_config, corpus = to_plain(config), open_corpus(config.data, vocab_size=config.model.vocab_size)

    if config.data.verify:
        corpus.verify(mesh.rank, mesh.world_size)
    facts = {"configuration": run_config, "data": corpus.fingerprints}
    check_same_run(facts, Ranks(mesh.host))

    state = TrainState(device=mesh.device)
    engine = build_engine(config, build_model(config, mesh), state, corpus)
    checkpoints = RunCheckpoints(config, run_dir, corpus, engine, state)
    checkpoints.resume_or_start()
    corpus.train.begin_at(state.first_sample)
    engine.optimizer.set_schedule(lr_schedule(config, state))

    mesh.on_rank_zero(save_run_inputs, run_config, run_dir, corpus, state)
    describe(config, engine, corpus, state, run_dir)
    mesh.on_rank_zero(truncate_metrics, run_dir / "metrics.jsonl", state.step, state.undone())

    with closing(build_train_batches(config, mesh, corpus, state)) as batches:
        if config.profile:
            profile_steps(lambda: engine.train_step(next(batches)), mesh.device, run_dir / "profile")
            return None
        with Loggers(run_dir, config.logger, run_config=run_config, step=state.step, rank=mesh.rank) as loggers:
            report = StepReport(loggers, build_throughput(config, mesh), sources=corpus.sources, steps=config.steps)
            loop(Run(config, engine, corpus, state, checkpoints, report, stop), batches, periodic)
    return state.valid_loss if config.objective == "valid/loss" else last_value(run_dir, config.objective)


if __name__ == "__main__":
    run(main, "train")
