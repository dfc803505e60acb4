"""The training loop."""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile

import torch

from conf.schema import TrainConfig
from data.batches import Batch
from data.config import parse_ranges
from data.dataset import Corpus
from data.loader import valid_batches
from parallel.engine import Engine, StepResult
from tracking.early_stop import is_hopeless
from tracking.run_folder import StopFile
from training.config import TrainingError
from training.evaluation import Evaluation, raise_first
from training.report import StepReport
from training.resume import RunCheckpoints
from training.spikes import find_spikes, spike_limits
from training.state import TrainState
from training.stop import StopRequest
from training.stragglers import Stragglers

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Run:
    """The state of a run that periodic actions receive; actions run on every rank."""

    config: TrainConfig
    engine: Engine
    corpus: Corpus
    state: TrainState
    checkpoints: RunCheckpoints
    report: StepReport
    stop: StopRequest
    finished: bool = False  # an action sets it, on every rank, to end the run after this step
    batches: list[Batch] = field(default_factory=list)  # of the last step
    result: StepResult | None = None  # of the last step; None if skip_batches skipped it
    loss_scale: float = 1.0
    stragglers: Stragglers = field(init=False)

    def __post_init__(self) -> None:
        self.stragglers = Stragglers(self.engine.mesh)

    def agree(self, error: Exception | None = None) -> bool:
        """Exchange stop requests and the ranks' own times; return whether the run continues.

        An `error` on any rank is raised on every rank, as an `EvaluationError`.
        """
        own_s, failed = self.stop.agree(self.state.step, self.stragglers.own_s(), failed=error is not None)
        self.stragglers.note(own_s)
        if failed:
            raise_first(self.engine.mesh, error)
        return not self.stop


@dataclass(frozen=True, slots=True)
class Periodic:
    """An action every `every` steps (0: never), and with `at_end` also after the last step."""

    every: int
    action: Callable[[Run], object]
    at_end: bool = False

    def run_if_due(self, run: Run) -> None:
        step = run.state.step
        if step and ((self.every and step % self.every == 0) or (self.at_end and step == run.config.steps)):
            self.action(run)


def loop(run: Run, batches: Iterator[list[Batch]], periodic: Sequence[Periodic] = ()) -> None:
    """Train until the end or a stop request, then save; `periodic` actions run before validation."""
    config, state, stop, early = run.config, run.state, run.stop, run.config.early_stop
    skipped = parse_ranges(config.skip_batches)
    evaluation = Evaluation(config)
    judging = (  # interrupted by a stop, and repeated on resume
        Periodic(config.valid_every, validate, at_end=True),
        Periodic(config.evaluate.every, evaluation.score_tasks, at_end=True),
        Periodic(config.samples.every, evaluation.write_samples, at_end=True),
    )
    actions = (
        Periodic(config.logger.every, log_step, at_end=True),
        Periodic(config.logger.every, lambda _: gc.collect(1)),
        Periodic(early.every, lambda _: is_hopeless(early, run.report.loggers.run_dir, state.step) and stop.give_up()),
        *periodic,
        Periodic(1, Run.agree),
        *judging,
        Periodic(1, lambda run: run.checkpoints.after_step()),
        Periodic(config.checkpoint.check_replicas_every, lambda run: run.checkpoints.check()),
        Periodic(1, partial(follow, StopFile(config.checkpoint.stop_file))),
        Periodic(config.checkpoint.every, lambda run: (run.checkpoints.save(), run.agree())),
    )
    with garbage_collection_paused(), run.checkpoints, run.stragglers.watch(run.engine):
        set_limits(run)
        for entry in judging:  # that a stop interrupted
            entry.run_if_due(run)
        while state.step < config.steps and not stop and not run.finished:
            train_step(run, batches, skip=any(state.step + 1 in part for part in skipped))
            for entry in actions:
                entry.run_if_due(run)
        run.checkpoints.save(last=True)
        stop.saved_step = run.checkpoints.saved_step
    run.report.loggers.plot()


def train_step(run: Run, batches: Iterator[list[Batch]], *, skip: bool) -> None:
    """Take a batch and train on it, unless `skip`."""
    config, state, throughput = run.config, run.state, run.report.throughput
    throughput.begin()
    run.batches, run.result = next(batches), None
    samples = config.packs_of_step(state.step)
    state.take_batch(samples=samples, tokens=samples * config.data.pack_tokens)
    if skip:
        state.skipped_steps += 1
        logger.info("step %d/%d  skipped by skip_batches", state.step, config.steps)
        return
    run.stragglers.begin(throughput.data_ready())
    run.loss_scale = run.engine.scaler.scale
    run.result = run.engine.train_step(run.batches)
    throughput.end(run.result.n_tokens)


def log_step(run: Run) -> None:
    """Log the last step; synchronizes with the device."""
    if run.result is None:
        return
    nonfinite = run.state.sync()
    run.report.throughput.lap()  # includes the wait for the device
    if nonfinite:
        in_a_row, limit = run.state.nonfinite_in_a_row, run.config.optimizer.max_nonfinite_steps
        why = "its gradient is not finite" + (", or it is a spike" if run.config.optimizer.skip_spikes else "")
        text = f"step %d changed nothing: {why} (%d such steps, %d in a row, the limit is %d)"
        logger.warning(text, run.state.step, run.state.nonfinite_steps, in_a_row, limit)
        if in_a_row >= limit:
            module = run.engine.find_nonfinite_module(run.batches)
            why = f"{in_a_row} steps in a row had no finite gradient (optimizer.max_nonfinite_steps), first in {module}"
            raise TrainingError(f"{why}; lower optimizer.lr, or use skip_batches")
    if not (run.result.n_targets or run.engine.mesh.rank):
        logger.warning("step %d had no target token, so its gradient was zero", run.state.step)
    run.report.more = {**run.stragglers.metrics, **run.checkpoints.take_metrics()}
    if sigma := run.config.optimizer.spike_sigma:
        figures = {"loss": float(run.result.loss), "gradient norm": float(run.result.grad_norm)}
        if spikes := find_spikes(run.state.recent, figures, sigma):
            run.state.spikes += 1
            say = logger.warning if not run.engine.mesh.rank else logger.debug
            say("step %d is a spike: %s", run.state.step, "; ".join(spikes), extra={"alert": "spike"})
        run.report.more["train/spikes"] = run.state.spikes
        set_limits(run)
    epochs = run.corpus.train.epochs(run.state.samples)
    run.report.step(run.state, run.result, epochs=epochs, loss_scale=run.loss_scale)


def set_limits(run: Run) -> None:
    """Set the limits above which the engine skips a step, with `skip_spikes`."""
    optimizer = run.config.optimizer
    if optimizer.skip_spikes:
        limits = spike_limits(run.state.recent, optimizer.spike_sigma)
        run.engine.limits_2.copy_(torch.tensor(list(limits.values())))


def validate(run: Run) -> None:
    """Evaluate the validation split, unless done at this step; a stop interrupts it, and it is repeated on resume."""
    config, state, mesh = run.config, run.state, run.engine.mesh
    if state.validated_step == state.step or not run.corpus.valid.n_packs or run.stop:
        return
    batches = valid_batches(
        run.corpus, config.data, max_tokens=config.valid_tokens, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size
    )
    totals_S4 = run.engine.evaluate(takewhile(lambda _: run.agree(), batches))
    if not run.stop:
        run.report.validation(state, totals_S4)


def follow(stop_file: StopFile, run: Run) -> None:
    """Save or stop if the stop file says so."""
    save_here, stop_here = stop_file.read(run.state.step)
    if save_here:
        run.checkpoints.save()
    if stop_here:
        run.finished = True
        logger.info("stopped at step %d, as %s asks", run.state.step, stop_file.path)


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Disable automatic garbage collection, which takes longer than a small step."""
    gc.collect()
    gc.freeze()  # exempt all objects so far
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()
