"""Save and resume a run, or initialise it from another run or a Hugging Face model."""

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import TrainConfig, stored, to_plain
from data.dataset import Corpus
from model.hf.families import pad_vocabulary, read_config, read_weights
from parallel.engine import Engine
from tracking.run_folder import check_changes, check_origin, check_same_model
from tracking.store import local_run
from training.agreement import check_tensors, facts_of
from training.checkpoint import PER_RANK, Checkpoint, Checkpoints, open_checkpoint
from training.config import CheckpointError, DamagedError, OnSaveError, SchedulerConfig, TrainingError
from training.optim.optimizer import Optimizer
from training.preflight import check_same_tokenizer
from training.ranks import Ranks
from training.schedules import learning_rate
from training.snapshot import Snapshot
from training.state import TrainState
from training.writer_process import direct

logger = logging.getLogger(__name__)

FIRST_RNG = f"{PER_RANK}cpu"

Saved = tuple[int, Path, dict[str, float]]  # step, checkpoint, metrics


class RunCheckpoints:
    """Saves and restores weights, optimizer, counters, loss scale and random states.

    A context manager, which waits for a save in progress when it exits with an error.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, corpus: Corpus, engine: Engine, state: TrainState) -> None:
        mesh, optimizer = engine.mesh, engine.optimizer
        self.config, self.run_config, self.run_dir, self.state = config, to_plain(config), run_dir, state
        self.mesh, self.optimizer, self.scaler = mesh, optimizer, engine.scaler
        bounds = {"add_bos": corpus.add_bos, "add_eos": corpus.add_eos}
        self.data = {"parts": corpus.fingerprints, "sources": corpus.sources, **bounds}
        asynchronous = config.checkpoint.asynchronous
        self.background = mesh.device.type == "cuda" if asynchronous is None else asynchronous
        # Background saves must not share a group with training, and a copy from a store may take longer than a step.
        group: Any = mesh.host and dist.new_group(backend="gloo")
        self.checkpoints, self.ranks = Checkpoints(run_dir, config.checkpoint, group), Ranks(mesh.host)
        self.rng_name = f"{FIRST_RNG}.{self.ranks.rank}" if self.ranks.rank else FIRST_RNG
        self.snapshot, self.writer = Snapshot(optimizer), ThreadPoolExecutor(1, "checkpoint")
        self.saved_step = 0
        self.saving: Future[Saved] | None = None  # the save in progress
        self.put_off = False  # save after the next step with a finite gradient
        self.metrics: dict[str, float] = {}  # of the last save, not yet logged

    def __enter__(self) -> "RunCheckpoints":
        if self.background and 0 < self.config.checkpoint.every < self.config.steps:
            self.snapshot.allocate()  # takes seconds
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self.saving is not None and isinstance(error, Exception):  # a second Ctrl-C does not wait
            logger.info("the last save: %s", self.saving.exception() or self.saving.result()[1])
        if self.snapshot.process is not None:
            self.writer.submit(self.snapshot.process.close)
        self.writer.shutdown(wait=False)

    def save(self, *, last: bool = False) -> None:
        """Save the run unless done at this step; a collective.

        In the background, waits for the previous save and returns once the tensors are copied. With `last`, returns
        when everything is saved, and raises any failure.
        """
        begun = time.perf_counter()
        if self.saving is not None and not self.saving.done():
            text = "step %d waits for the previous save; checkpoint.every (%d) is shorter than a save takes"
            logger.warning(text, self.state.step, self.config.checkpoint.every)
        self.note_saved(wait=True)
        if self.saved_step == self.state.step or self._is_put_off(last):
            return
        progress = {"progress": self.state.state_dict(), "scaler": self.scaler.state_dict()}
        state = {"config": self.run_config, "data": self.data, **progress}
        in_background = self.background and not last
        optimizer = self.snapshot.take() if in_background else self.optimizer
        write = partial(self._write, begun, optimizer, self.state.step, torch.get_rng_state(), state)
        if in_background:
            self.saving = self.writer.submit(write)
        else:
            self._note(write, last=last)
        self.metrics["perf/checkpoint_stall_s"] = time.perf_counter() - begun

    def _is_put_off(self, last: bool) -> bool:
        """Return whether to postpone a save, because the last steps had no finite gradient.

        The final save tolerates one such step, which may be an fp16 overflow.
        """
        self.state.sync()
        in_a_row = self.state.nonfinite_in_a_row
        bad = in_a_row > (1 if last else 0)
        if bad and not self.put_off:
            logger.warning("step %d is not saved: its gradient is not finite (%d in a row)", self.state.step, in_a_row)
        self.put_off = bad
        return bad

    def _write(self, begun: float, optimizer: Optimizer, step: int, rng: Tensor, state: dict[str, Any]) -> Saved:
        process = self.snapshot.process if optimizer is not self.optimizer else None
        call, saved = process.call if process else direct, optimizer.saved_parts()
        # Data are read where the files are written; here, tensors are only shapes and layouts.
        tensors = {name: laid_out(torch.empty(()).expand(parts[0].shape)) for name, (laid_out, parts) in saved.items()}
        parts = {name: parts for name, (_, parts) in saved.items()}
        check_tensors(tensors, self.checkpoints.ranks, partial(call, facts_of, dict(parts)))
        tensors[self.rng_name], parts[self.rng_name] = rng, (rng,)
        path = self.checkpoints.save(step, tensors, state, parts, call)
        seconds = time.perf_counter() - begun
        rate = self.checkpoints.saved_bytes / seconds
        return step, path, {"perf/checkpoint_s": seconds, "perf/checkpoint_bytes_per_s": rate}

    def note_saved(self, *, wait: bool = False) -> None:
        """Record a background save that has ended, at the same step on all ranks."""
        if self.saving is not None and (wait or not self.mesh.all_reduce_max(not self.saving.done())):
            saving, self.saving = self.saving, None
            self._note(saving.result)

    def _note(self, outcome: Callable[[], Saved], *, last: bool = False) -> None:
        """Record the result of a save; log or raise its failure."""
        try:
            self.saved_step, path, times = outcome()
        except CheckpointError as error:
            if last or self.config.checkpoint.on_save_error is OnSaveError.stop:
                raise
            logger.warning("%s; training continues, and saves at the next interval", error)
            return
        logger.info("saved %s", path)
        self.metrics |= times

    def after_step(self) -> None:
        """Record a save that has ended; make one that was put off."""
        self.note_saved()
        if self.put_off:
            self.save()

    def take_metrics(self) -> dict[str, float]:
        """Return the metrics of the last save, once."""
        metrics, self.metrics = self.metrics, {}
        return metrics

    def check(self) -> None:
        """Raise `TrainingError` unless weights and moments are finite and their replicas are equal."""
        check_tensors(self.optimizer.state_tensors(), self.ranks)

    def resume_or_start(self) -> None:
        """Resume from the run's newest checkpoint, else initialise from `init_from`, else keep the initial weights.

        Raises `CheckpointError` if configuration or data have changed.
        """
        if self.checkpoints.newest(self._resume) is None and self.config.init_from is not None:
            origin = self.config.init_from
            self._initialise(self.checkpoints.ranks.on_first(lambda: local_run(origin)))
        self.saved_step = self.state.step

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore a checkpoint, which must have exactly the tensors that this run saves.

        A rank without a saved random state takes rank 0's.
        """
        self._load(checkpoint, "", exact=True)
        rng_name = self.rng_name if self.rng_name in checkpoint.tensors else FIRST_RNG
        torch.set_rng_state(checkpoint.read_names([rng_name])[rng_name])
        if "scaler" in checkpoint.state:  # not in an older one
            self.scaler.load_state_dict(checkpoint.state["scaler"])
        self.state.load_state_dict(checkpoint.state["progress"])

    def _resume(self, checkpoint: Checkpoint) -> None:
        config, before = self.config, checkpoint.state["config"]
        accepted = config.checkpoint.accept_changes
        check_changes(before, self.run_config, accepted, self.run_dir)
        saved, parts = checkpoint.state["data"]["parts"], self.data["parts"]
        changed, key = saved != parts, "data.added" if set(saved) <= set(parts) else "data.fingerprint"
        if changed and key not in accepted:
            remedy = f"pass checkpoint.accept_changes=[{key}] to start an epoch over all of it, or another name="
            raise CheckpointError(f"the data changed since {self.run_dir} was started; {remedy}")
        self.restore(checkpoint)
        try:
            self.check()
        except TrainingError as error:
            raise DamagedError(f"{checkpoint.path}: {error}") from None
        if changed:
            self.state.first_sample = self.state.samples
            logger.info("the data changed: a new epoch over all of it starts at step %d", self.state.step)
        logger.info("resumed from %s", checkpoint.path)
        if not self.ranks.rank and config.init_from not in (None, before.get("init_from")):
            logger.warning("init_from (%s) is ignored: the run resumes from its checkpoint", config.init_from)
        scheduler, update = stored(SchedulerConfig, before["scheduler"]), self.state.updates
        then = learning_rate(update, steps=before["steps"], lr=before["optimizer"]["lr"], config=scheduler)
        now = learning_rate(update, steps=config.steps, lr=config.optimizer.lr, config=config.scheduler)
        if not self.ranks.rank and not math.isclose(then, now, rel_tol=1e-6):
            logger.warning("the learning rate is %.3g; with the run's earlier settings it would be %.3g", now, then)

    def _initialise(self, path: Path) -> None:
        """Load the parts in `init_content` from `init_from`: weights, moments, schedule or data position."""
        content, vocab_size = set(self.config.init_content), self.config.model.vocab_size
        if "all" in content:
            content = {"model", "optimizer", "scheduler", "sampler"}
        check_origin(path)
        check_same_tokenizer(replace(self.config, init_from=str(path)))
        other = None if (path / "config.json").exists() else open_checkpoint(path, self.checkpoints.ranks)
        model = to_plain(read_config(path)[0]) if other is None else other.state["config"]["model"]
        path = path if other is None else other.path
        check_same_model(model, self.run_config["model"], path)
        if content != {"model"} and not (other and any(name.startswith("optimizer.") for name in other.tensors)):
            raise CheckpointError(f"init_content ({', '.join(sorted(content))}): {path} has only a model")
        if "model" in content:
            if other is not None and model["vocab_size"] == vocab_size:
                self._load(other, "model.")
            else:
                weights = read_weights(path) if other is None else other.read("model.")
                self.optimizer.load_weights(pad_vocabulary(weights, vocab_size))
        if other is not None:
            self._take_progress(other, content)
        logger.info("%s from %s", ", ".join(sorted(content)), path)

    def _take_progress(self, other: Checkpoint, content: set[str]) -> None:
        before = other.state["progress"]
        if "optimizer" in content:
            self._load(other, "optimizer.")
        if "scheduler" in content:
            self.state.load_state_dict({"updates": before["updates"]})
            if other.state["config"]["precision"]["compute"] == self.run_config["precision"]["compute"]:
                self.scaler.load_state_dict(other.state["scaler"])
        if "sampler" in content:
            self.state.load_state_dict({key: before[key] for key in ("step", "samples", "first_sample", "tokens")})

    def _load(self, checkpoint: Checkpoint, prefix: str, *, exact: bool = False) -> None:
        """Load the optimizer's tensors whose names start with `prefix`; `exact`: the checkpoint has no others."""
        tensors = self.optimizer.state_tensors()
        wanted = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        checkpoint.load(wanted, exact=exact)
        self.optimizer.load_tensors(tensors)
