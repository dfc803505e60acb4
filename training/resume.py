"""Where a run starts: its own newest checkpoint, another run's weights, a Hugging Face model, or nothing."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conf.schema import TrainConfig, stored, to_plain
from model.hf.families import pad_vocabulary, read_config, read_weights
from parallel.loss_scaler import LossScaler
from tracking.run_folder import check_changes, check_origin, check_same_model
from training.agreement import check_tensors
from training.checkpoint import PER_RANK, Checkpoint, Checkpoints, open_checkpoint
from training.config import CheckpointError, SchedulerConfig
from training.optim.optimizer import Optimizer
from training.preflight import check_same_tokenizer
from training.schedules import learning_rate
from training.state import TrainState

logger = logging.getLogger(__name__)

FIRST_RNG = f"{PER_RANK}cpu"


@dataclass
class RunCheckpoints:
    """Saves and restores a run: weights, optimizer, counters, loss scale, random states."""

    checkpoints: Checkpoints
    state: TrainState
    optimizer: Optimizer
    scaler: LossScaler
    run_config: dict[str, Any]
    data: dict[str, Any]  # what is saved of the corpus; data["parts"] are the fingerprints of its files
    saved_step: int = 0

    def __post_init__(self) -> None:
        self.run_dir = self.checkpoints.folder.parent
        rank = self.checkpoints.ranks.rank
        self.rng_name = f"{FIRST_RNG}.{rank}" if rank else FIRST_RNG

    def save(self) -> None:
        """Save the run as it stands, all ranks together, unless that was done at this step."""
        if self.saved_step == self.state.step:
            return
        self.state.sync()
        tensors = {**self.optimizer.state_tensors(), self.rng_name: torch.get_rng_state()}
        check_tensors(tensors, self.checkpoints.ranks)
        progress = {"progress": self.state.state_dict(), "scaler": self.scaler.state_dict()}
        state = {"config": self.run_config, "data": self.data, **progress}
        logger.info("saved %s", self.checkpoints.save(self.state.step, tensors, state))
        self.saved_step = self.state.step

    def check(self) -> None:
        """Raise `TrainingError` unless weights and moments are finite and replicas of them are equal."""
        check_tensors(self.optimizer.state_tensors(), self.checkpoints.ranks)

    def resume_or_start(self, config: TrainConfig) -> None:
        """Bring the run to where it starts, and log where that is.

        A checkpoint of this run comes first, then `init_from`, then freshly drawn weights. A run that was begun with
        another configuration or other data is refused.
        """
        checkpoint = self.checkpoints.newest()
        if checkpoint is not None:
            self._resume(checkpoint, config)
        elif config.init_from is not None:
            self._initialise(config, Path(config.init_from))
        self.saved_step = self.state.step

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over all of a checkpoint; it must hold exactly what this run saves.

        A rank that was not there when it was saved takes the first one's random state.
        """
        self._load(checkpoint, "", exact=True)
        rng_name = self.rng_name if self.rng_name in checkpoint.tensors else FIRST_RNG
        torch.set_rng_state(checkpoint.read_names([rng_name])[rng_name])
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


def warn_of_changed_rate(before: dict[str, Any], config: TrainConfig, update: int) -> None:
    """Log the learning rate of the next update, if under the configuration until now it would be another."""
    scheduler = stored(SchedulerConfig, before["scheduler"])
    then = learning_rate(update, steps=before["steps"], lr=before["optimizer"]["lr"], config=scheduler)
    now = learning_rate(update, steps=config.steps, lr=config.optimizer.lr, config=config.scheduler)
    if not math.isclose(then, now, rel_tol=1e-6):
        logger.warning("the learning rate goes on at %.3g; as the run was begun, it would be %.3g", now, then)
