"""Train a model: python train.py model=7b data=pile_small; README.md lists every group.

Nothing here imports torch before the configuration is known to be right.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from conf.cli import checked, data_settings, is_user_error, report_user_errors, run
from conf.schema import TrainConfig, parse_ranges, to_plain
from launch.ranks import launch
from training.preflight import check_run

if TYPE_CHECKING:
    from data.dataset import Corpus
    from parallel.engine import Engine
    from parallel.mesh import Mesh
    from training.report import Report
    from training.state import TrainState
    from training.stop import StopRequest

logger = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    with report_user_errors():
        config: TrainConfig = checked(cfg)
        run_dir = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))
        if config.dry_run.enabled:
            from dry_run.run import run_dry_run

            return run_dry_run(config)
        check_run(config, run_dir, data_settings(HydraConfig.get()))
        return launch(work, config, to_plain(config), run_dir, config=config.parallel, is_user_error=is_user_error)


def work(config: TrainConfig, run_config: dict[str, Any], run_dir: Path) -> float | None:
    """Be one rank of a run and give its validation loss; a stop that was asked for exits with a signal's code."""
    # Near the end of a device's memory, freed pieces between others are lost without it. Read as CUDA starts.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    from launch.slurm import requeue_slurm_job
    from parallel.mesh import distributed
    from tracking.logs import log_to
    from tracking.run_folder import locked
    from tracking.status import Status
    from training.out_of_memory import explain_oom
    from training.stop import StopRequest

    with (
        distributed(config.parallel) as mesh,
        locked(run_dir, mesh.rank),
        log_to(run_dir, mesh.rank),
        Status(run_dir, run_config, rank=mesh.rank) as status,
        StopRequest(mesh.maximum) as stop,
        explain_oom(config),
    ):
        valid_loss = train(config, run_config, mesh, run_dir, stop)
        status.end(valid_loss, stopped=bool(stop), given_up=stop.given_up)
    if stop.for_a_requeue:
        requeue_slurm_job(run_dir, rank=mesh.rank, max_requeues=config.launcher.max_requeues)
    if stop and not stop.given_up:
        sys.exit(stop.exit_code)
    return valid_loss


def train(
    config: TrainConfig, run_config: dict[str, Any], mesh: "Mesh", run_dir: Path, stop: "StopRequest"
) -> float | None:
    """Run the steps that are left of a run and give its validation loss."""
    from data.dataset import open_corpus
    from tracking.loggers import Loggers
    from tracking.run_folder import truncate_metrics
    from training.checkpoint import Checkpoints
    from training.describe import describe, save_run_inputs
    from training.optim.optimizer import AdamW
    from training.profile import profile_steps
    from training.report import Report
    from training.resume import Restorable, resume_or_start
    from training.scaler import LossScaler
    from training.setup import (
        build_engine,
        build_model,
        build_throughput,
        build_train_batches,
        lr_schedule,
        read_hf_weights,
    )
    from training.state import TrainState

    # Data: checked first, because it is wrong most often and opened in no time.
    corpus = open_corpus(config.data, vocab_size=config.model.vocab_size)

    model, stages = build_model(config, mesh)
    optimizer, scaler, progress = (
        AdamW(model, config.optimizer, tied_params=model.tied_params),
        LossScaler(config.precision),
        TrainState(),
    )
    kept = Restorable(optimizer, scaler, progress, mesh.rank)
    checkpoints = Checkpoints(run_dir, keep=config.checkpoint.keep, group=mesh.host)
    resume_or_start(
        kept,
        checkpoints,
        config.checkpoint,
        run_config=run_config,
        fingerprints=corpus.fingerprints,
        read_hf=partial(read_hf_weights, model=config.model),
    )
    corpus.train.begin_at(progress.first_sample)
    optimizer.set_schedule(lr_schedule(config, progress))
    engine = build_engine(
        config,
        mesh,
        model,
        stages,
        optimizer,
        scaler,
        progress,
        n_sources=len(corpus.sources),
        bytes_per_token=corpus.bytes_per_token,
    )
    mesh.on_rank_zero(save_run_inputs, config, run_config, run_dir, corpus)
    describe(config, mesh, corpus, progress, run_dir)
    validated = progress.validated_step == progress.step
    mesh.on_rank_zero(truncate_metrics, run_dir / "metrics.jsonl", progress.step, validated)

    def save() -> None:
        progress.read(engine.counts())
        about = {"parts": corpus.fingerprints, "sources": corpus.sources}
        about |= {"add_bos": corpus.add_bos, "add_eos": corpus.add_eos}
        state = {"config": run_config, "data": about, **kept.state()}
        logger.info("saved %s", checkpoints.save(progress.step, kept.tensors(), state))

    # The batches' workers end here, however the steps end.
    with closing(build_train_batches(config, mesh, corpus, progress)) as batches_of_steps:
        if config.profile:
            profile_steps(lambda: engine.train_step(next(batches_of_steps)), mesh.device, run_dir / "profile")
            return None
        with Loggers(run_dir, config.logger, run_config=run_config, step=progress.step, rank=mesh.rank) as sinks:
            report = Report(sinks, build_throughput(config, mesh), sources=corpus.sources, steps=config.steps)
            loop(config, engine, corpus, batches_of_steps, progress, report, stop, save)
    return progress.valid_loss


def loop(
    config: TrainConfig,
    engine: "Engine",
    corpus: "Corpus",
    batches_of_steps: Iterator[Any],
    progress: "TrainState",
    report: "Report",
    stop: "StopRequest",
    save: Callable[[], None],
) -> None:
    """Take batches and steps until the run is over or asked to stop; what is due comes after each step."""
    from tracking.early_stop import is_hopeless
    from tracking.run_folder import StopFile
    from training.garbage import collected_between_steps
    from training.state import check_bad_steps

    left_out = parse_ranges(config.skip_batches)
    stop_file = StopFile(config.checkpoint.stop_file)
    with collected_between_steps() as collect_garbage:
        validate_if_due(config, engine, corpus, progress, report, stop)  # if a stop cut it short
        while progress.step < config.steps and not stop:
            report.throughput.begin()
            batches = next(batches_of_steps)
            report.throughput.data_ready()
            samples = config.packs_of_step(progress.step)
            progress.take(samples=samples, tokens=samples * config.data.pack_tokens)
            if any(progress.step in part for part in left_out):
                progress.skipped_steps += 1
                logger.info("step %d/%d  left out, as skip_batches asks", progress.step, config.steps)
            else:
                scale = engine.scaler.scale
                result = engine.train_step(batches)
                if progress.step % config.logger.every and progress.step < config.steps:
                    report.throughput.end(result.n_tokens)
                else:
                    bad = progress.read(engine.counts())  # waits for the device: the host runs ahead in between
                    report.throughput.end(result.n_tokens)
                    if bad:
                        limit = config.optimizer.max_nonfinite_steps
                        check_bad_steps(progress, limit, partial(engine.find_nonfinite_module, batches))
                    collect_garbage()
                    lr, beta2 = result.rates_2.tolist()
                    epochs = corpus.train.epochs(progress.samples)
                    report.step(progress, result, epochs, lr=lr, beta2=beta2, loss_scale=scale)
            if is_hopeless(config.early_stop, report.sinks.run_dir, progress.step):
                stop.give_up()
            stop.agree()
            validate_if_due(config, engine, corpus, progress, report, stop)
            save_here, stop_here = stop_file.read(progress.step)
            every = config.checkpoint.every
            if save_here or stop or progress.step == config.steps or (every and progress.step % every == 0):
                save()
            if stop_here:
                logger.info("stopped at step %d, as %s asks", progress.step, config.checkpoint.stop_file)
                break
    report.sinks.plot()


def validate_if_due(
    config: TrainConfig,
    engine: "Engine",
    corpus: "Corpus",
    progress: "TrainState",
    report: "Report",
    stop: "StopRequest",
) -> None:
    """Score the validation split at the end and every `valid_every` steps; a stop cuts it short, to be done again."""
    from data.loader import valid_batches

    step, every = progress.step, config.valid_every
    due = step == config.steps or bool(step and every and step % every == 0)
    if due and progress.validated_step != step and corpus.valid.n_packs:
        mesh = engine.mesh
        batches = valid_batches(
            corpus, config.data, max_tokens=config.valid_tokens, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size
        )
        totals_S4 = engine.evaluate(takewhile(lambda _: not stop, batches))
        if not stop:
            report.validation(progress, totals_S4)


if __name__ == "__main__":
    run(main, "train")
