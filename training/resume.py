"""Where a run starts: its own newest checkpoint, another run's weights, a Hugging Face model, or nothing."""

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import TrainConfig, stored, to_plain
from data.dataset import Corpus
from model.hf.families import pad_vocabulary, read_config, read_weights
from parallel.loss_scaler import LossScaler
from parallel.mesh import Mesh
from tracking.run_folder import check_changes, check_origin, check_same_model
from training.agreement import check_tensors, nonfinite_tensors
from training.checkpoint import PER_RANK, Checkpoint, Checkpoints, open_checkpoint
from training.config import CheckpointConfig, CheckpointError, DamagedError, OnSaveError, SchedulerConfig
from training.optim.optimizer import Optimizer
from training.preflight import check_same_tokenizer
from training.ranks import Ranks, some
from training.schedules import learning_rate
from training.snapshot import Snapshot
from training.state import TrainState

logger = logging.getLogger(__name__)

FIRST_RNG = f"{PER_RANK}cpu"


Saved = tuple[int, Path, dict[str, float]]  # the step, the checkpoint, the times for the metrics


@dataclass
class RunCheckpoints:
    """Saves and restores a run: weights, optimizer, counters, loss scale, random states.

    A context: when an error ends it, the save that is under way is waited for.
    """

    checkpoints: Checkpoints  # of a group of its own, if they are written in the background
    state: TrainState
    optimizer: Optimizer
    scaler: LossScaler
    run_config: dict[str, Any]
    data: dict[str, Any]  # what is saved of the corpus; data["parts"] are the fingerprints of its files
    config: CheckpointConfig = field(default_factory=CheckpointConfig)
    background: bool = False
    saved_step: int = 0
    saving: "Future[Saved] | None" = None  # the save that is under way
    ready: "Future[None] | None" = None  # when there is memory for a copy of the tensors
    put_off: bool = False  # a save is due at the next step whose gradient is finite
    metrics: dict[str, float] = field(default_factory=dict)  # of the last save, until they are logged

    def __post_init__(self) -> None:
        self.run_dir, self.ranks = self.checkpoints.folder.parent, self.checkpoints.ranks
        rank = self.checkpoints.ranks.rank
        self.rng_name = f"{FIRST_RNG}.{rank}" if rank else FIRST_RNG
        self.snapshot, self.writer = Snapshot(self.optimizer), ThreadPoolExecutor(1, "checkpoint")

    @classmethod
    def of(cls, config: CheckpointConfig, mesh: Mesh, run_dir: Path, corpus: Corpus, **parts: Any) -> "RunCheckpoints":
        """Return those of a run folder; `parts` are what they hold of the run."""
        background = mesh.device.type == "cuda" if config.asynchronous is None else config.asynchronous
        group: Any = dist.new_group(backend="gloo") if background and mesh.host is not None else mesh.host
        address = config.path and f"{config.path.rstrip('/')}/{run_dir.name}"
        kept = {"keep": config.keep, "keep_every": config.keep_every, "keep_best": config.keep_best}
        checkpoints = Checkpoints(run_dir, **kept, group=group, address=address)
        bounds = {"add_bos": corpus.add_bos, "add_eos": corpus.add_eos}
        data = {"parts": corpus.fingerprints, "sources": corpus.sources, **bounds}
        run = cls(checkpoints, data=data, config=config, background=background, **parts)
        run.ranks = Ranks(mesh.host)  # between steps
        return run

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self.saving is not None and isinstance(error, Exception):  # a second Ctrl-C does not wait
            logger.info("the last save: %s", self.saving.exception() or self.saving.result()[1])
        self.writer.shutdown(wait=False)

    def save(self, *, last: bool = False) -> None:
        """Save the run as it stands, all ranks together, unless that was done at this step.

        In the background this returns once the tensors are copied, after the save before is done. With `last` it
        returns when all is saved, and every failure is raised.
        """
        begun = time.perf_counter()
        if self.saving is not None and not self.saving.done():
            text = "step %d waits for the save before it; raise checkpoint.every (%d) above what a save takes"
            logger.warning(text, self.state.step, self.config.every)
        self.note_saved(wait=True)
        if self.saved_step == self.state.step or self._is_put_off(last):
            return
        progress = {"progress": self.state.state_dict(), "scaler": self.scaler.state_dict()}
        state = {"config": self.run_config, "data": self.data, **progress}
        in_background = self.background and not last
        if in_background and self.ready is not None:
            self.ready.result()
        optimizer = self.snapshot.take() if in_background else self.optimizer
        write = partial(self._write, begun, optimizer, self.state.step, torch.get_rng_state(), state)
        self.saving = self.writer.submit(write) if in_background else _done(write)
        stall_s = time.perf_counter() - begun
        if not in_background:
            self.note_saved(wait=True, last=last)
        self.metrics["perf/checkpoint_stall_s"] = stall_s

    def _is_put_off(self, last: bool) -> bool:
        """Return whether a run of steps without a finite gradient is under way, after which nothing is saved.

        At the end a single one is let pass: it may be an overflow of fp16.
        """
        self.state.sync()
        in_a_row = self.state.nonfinite_in_a_row
        bad = in_a_row > (1 if last else 0)
        if bad and not self.put_off:
            logger.warning("step %d is not saved: its gradient is not finite (%d in a row)", self.state.step, in_a_row)
        self.put_off = bad
        return bad

    def _write(self, begun: float, optimizer: Optimizer, step: int, rng: Tensor, state: dict[str, Any]) -> Saved:
        tensors = {**optimizer.state_tensors(), self.rng_name: rng}
        check_tensors(tensors, self.checkpoints.ranks)
        path = self.checkpoints.save(step, tensors, state)
        seconds = time.perf_counter() - begun
        rate = self.checkpoints.saved_bytes / seconds
        return step, path, {"perf/checkpoint_s": seconds, "perf/checkpoint_bytes_per_s": rate}

    def note_saved(self, *, wait: bool = False, last: bool = False) -> None:
        """Take note of a save that has ended, at the same step on all ranks; its failure is logged or raised once."""
        if self.saving is None or not (wait or self.ranks.all(self.saving.done())):
            return
        saving, self.saving = self.saving, None
        try:
            self.saved_step, path, times = saving.result()
        except CheckpointError as error:
            if last or self.config.on_save_error is OnSaveError.stop:
                raise
            logger.warning("%s; the run goes on, and saves at the next interval", error)
            return
        logger.info("saved %s", path)
        self.metrics |= times

    def after_step(self) -> None:
        """Take note of a save that has ended, and make one that was put off."""
        every = self.config.every
        if self.background and every and self.ready is None and self.state.step % every == every // 2:
            self.ready = self.writer.submit(self.snapshot.allocate)  # takes seconds, before the first save
        self.note_saved()
        if self.put_off:
            self.save()

    def take_metrics(self) -> dict[str, float]:
        """Return the times of the last save, once."""
        metrics, self.metrics = self.metrics, {}
        return metrics

    def check(self) -> None:
        """Raise `TrainingError` unless weights and moments are finite and replicas of them are equal."""
        check_tensors(self.optimizer.state_tensors(), self.ranks)

    def resume_or_start(self, config: TrainConfig) -> None:
        """Bring the run to where it starts, and log where that is.

        A checkpoint of this run comes first, then `init_from`, then freshly drawn weights. A run that was begun with
        another configuration or other data is refused.
        """
        checkpoint = self.checkpoints.newest(lambda found: self._resume(found, config))
        if checkpoint is None and config.init_from is not None:
            self._initialise(config, Path(config.init_from))
        self.saved_step = self.state.step

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over all of a checkpoint; it must hold exactly what this run saves.

        A rank that was not there when it was saved takes the first one's random state.
        """
        self._load(checkpoint, "", exact=True)
        rng_name = self.rng_name if self.rng_name in checkpoint.tensors else FIRST_RNG
        torch.set_rng_state(checkpoint.read_names([rng_name])[rng_name])
        if "scaler" in checkpoint.state:
            self.scaler.load_state_dict(checkpoint.state["scaler"])
        self.state.load_state_dict(checkpoint.state["progress"])

    def _resume(self, checkpoint: Checkpoint, config: TrainConfig) -> None:
        accepted = config.checkpoint.accept_changes
        check_changes(checkpoint.state["config"], self.run_config, accepted, self.run_dir)
        saved, parts = checkpoint.state["data"]["parts"], self.data["parts"]
        before, now, changed = set(saved), set(parts), saved != parts
        key = "data.added" if before <= now else "data.fingerprint"
        if changed and key not in accepted:
            what = f"{len(now - before)} files were added to the data" if before <= now else "the data changed"
            remedy = f"pass checkpoint.accept_changes=[{key}] to begin an epoch over all of it, or another name="
            raise CheckpointError(f"{what} since {self.run_dir} was begun; {remedy}")
        self.restore(checkpoint)
        if names := nonfinite_tensors(self.optimizer.state_tensors(), self.ranks):
            raise DamagedError(f"{checkpoint.path}: {some(names)} are not finite")
        if changed:
            self.state.first_sample = self.state.samples
            logger.info("the data changed: a new epoch over all of it begins at step %d", self.state.step)
        logger.info("resumed from %s", checkpoint.path)
        if self.checkpoints.ranks.rank == 0:
            warn_of_changed_rate(checkpoint.state["config"], config, self.state.updates)

    def _initialise(self, config: TrainConfig, path: Path) -> None:
        """Take what `init_content` names from `init_from`: weights, moments, the schedule's place, the data's place."""
        content = set(config.init_content)
        if "all" in content:
            content = {"model", "optimizer", "scheduler", "sampler"}
        asked = f"init_content ({', '.join(sorted(content))})"
        check_origin(path)
        check_same_tokenizer(config)
        vocab_size = config.model.vocab_size
        if (path / "config.json").exists():
            if content != {"model"}:
                raise CheckpointError(f"{asked}: the Hugging Face folder {path} holds a model only")
            check_same_model(to_plain(read_config(path)[0]), self.run_config["model"], path)
            self.optimizer.load_weights(pad_vocabulary(read_weights(path), vocab_size))
            logger.info("weights from %s", path)
            return
        other = open_checkpoint(path, self.checkpoints.ranks)
        check_same_model(other.state["config"]["model"], self.run_config["model"], other.path)
        if content != {"model"} and not any(name.startswith("optimizer.") for name in other.tensors):
            raise CheckpointError(f"{asked}: the imported checkpoint {other.path} holds a model only")
        grows = other.state["config"]["model"]["vocab_size"] < vocab_size
        for word in ("model", "optimizer"):
            if word == "model" and word in content and grows:
                self.optimizer.load_weights(pad_vocabulary(other.read("model."), vocab_size))
            elif word in content:
                self._load(other, f"{word}.")
        before = other.state["progress"]
        if "scheduler" in content:
            self.state.load_state_dict({"updates": before["updates"]})
            if other.state["config"]["precision"]["compute"] == self.run_config["precision"]["compute"]:
                self.scaler.load_state_dict(other.state["scaler"])  # of another precision it would be no scale
        if "sampler" in content:
            self.state.load_state_dict({key: before[key] for key in ("step", "samples", "first_sample", "tokens")})
        logger.info("%s from %s", ", ".join(sorted(content)), other.path)

    def _load(self, checkpoint: Checkpoint, prefix: str, *, exact: bool = False) -> None:
        """Load the optimizer's tensors whose names begin with `prefix`; `exact`: the checkpoint holds no others."""
        tensors = self.optimizer.state_tensors()
        wanted = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        (checkpoint.load_into if exact else checkpoint.load)(wanted)
        self.optimizer.load_tensors(tensors)


def _done(call: Callable[[], Saved]) -> "Future[Saved]":
    """Return the outcome of a call as one in the background has it."""
    outcome: Future[Saved] = Future()
    try:
        outcome.set_result(call())
    except Exception as error:
        outcome.set_exception(error)
    return outcome


def warn_of_changed_rate(before: dict[str, Any], config: TrainConfig, update: int) -> None:
    """Log the learning rate of the next update, if under the configuration until now it would be another."""
    scheduler = stored(SchedulerConfig, before["scheduler"])
    then = learning_rate(update, steps=before["steps"], lr=before["optimizer"]["lr"], config=scheduler)
    now = learning_rate(update, steps=config.steps, lr=config.optimizer.lr, config=config.scheduler)
    if not math.isclose(then, now, rel_tol=1e-6):
        logger.warning("the learning rate goes on at %.3g; as the run was begun, it would be %.3g", now, then)
