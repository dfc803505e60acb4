"""Where a run starts: its own newest checkpoint, another run's weights, or nothing."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tracking.run_folder import check_changes, check_origin, check_same_model
from training.checkpoint import PER_RANK, Checkpoint, Checkpoints, open_checkpoint
from training.config import CheckpointConfig, CheckpointError, Resume
from training.optim.optimizer import AdamW
from training.ranks import Ranks
from training.scaler import LossScaler
from training.state import TrainState

logger = logging.getLogger(__name__)

FIRST_RNG = f"{PER_RANK}cpu"


class Restorable:
    """Everything of a run that a checkpoint keeps, as far as this rank holds it."""

    def __init__(self, optimizer: AdamW, scaler: LossScaler, progress: TrainState, rank: int = 0) -> None:
        self.optimizer, self.scaler, self.progress = optimizer, scaler, progress
        self.rng_name = f"{PER_RANK}cpu.{rank}" if rank else FIRST_RNG

    def tensors(self) -> dict[str, Tensor]:
        return {**self.optimizer.state_tensors(), self.rng_name: torch.get_rng_state()}

    def state(self) -> dict[str, Any]:
        return {"progress": self.progress.state_dict(), "scaler": self.scaler.state_dict()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over all of a checkpoint; it must hold exactly what this run keeps.

        A rank that was not there when it was saved takes the first one's random state.
        """
        tensors = self.optimizer.state_tensors()
        checkpoint.load_into(tensors)
        self.optimizer.load_tensors(tensors)
        rng_name = self.rng_name if self.rng_name in checkpoint.tensors else FIRST_RNG
        torch.set_rng_state(checkpoint.read_names([rng_name])[rng_name])
        self.scaler.load_state_dict(checkpoint.state["scaler"])
        for key, value in checkpoint.state["progress"].items():
            setattr(self.progress, key, value)

    def take(self, checkpoint: Checkpoint, prefix: str) -> None:
        """Read the tensors that begin with `prefix` from another run's checkpoint."""
        tensors = self.optimizer.state_tensors()
        checkpoint.load({name: tensor for name, tensor in tensors.items() if name.startswith(prefix)})
        self.optimizer.load_tensors(tensors)

    @torch.no_grad()
    def take_weights(self, weights: dict[str, Tensor], origin: Path) -> None:
        """Copy whole weights, by our names, each rank its part; none may be missing or of another shape."""
        tensors = self.optimizer.state_tensors()
        for name, tensor in tensors.items():
            if not name.startswith("model."):
                continue
            found = weights.get(name.removeprefix("model."))
            if found is None or found.shape != tensor.shape:
                shape = "missing" if found is None else tuple(found.shape)
                raise CheckpointError(
                    f"init_from ({origin}): {name} is {shape} there and {tuple(tensor.shape)} here; "
                    "pass the model= that it is of"
                )
            _copy_part(tensor, found)
        self.optimizer.load_tensors(tensors)


def _copy_part(tensor: Tensor, whole: Tensor) -> None:
    """Fill a tensor, or the part of it that this rank holds, from a whole one."""
    if not isinstance(tensor, DTensor):
        tensor.copy_(whole)
        return
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    part = tuple(slice(begin, begin + length) for begin, length in zip(offset, shape, strict=True))
    tensor.to_local().copy_(whole[part])


def resume_or_start(
    kept: Restorable,
    checkpoints: Checkpoints,
    config: CheckpointConfig,
    *,
    run_config: dict[str, Any],
    fingerprints: list[str],
    read_hf: Callable[[Path], dict[str, Tensor]],
) -> None:
    """Bring a run to where it starts, and say where that is.

    A checkpoint of this run comes first, then `init_from`, then freshly drawn weights. A run that was
    begun with another configuration or other data is refused.
    """
    run_dir = checkpoints.folder.parent
    checkpoint = checkpoints.newest()
    if checkpoint is None:
        if config.resume is Resume.must:
            raise CheckpointError(
                f"checkpoint.resume (must): there is no checkpoint in {run_dir}; "
                "pass checkpoint.resume=auto to begin here"
            )
        if run_config["init_from"] is not None:
            _initialise(kept, run_config, read_hf, checkpoints.ranks)
        return
    if config.resume is Resume.never:
        raise CheckpointError(
            f"checkpoint.resume (never): {run_dir} holds {checkpoint.path.name} already; "
            "pass another name= to start anew"
        )
    check_changes(checkpoint.state["config"], run_config, config.accept_changes, run_dir)
    changed = _check_data(checkpoint.state["data"]["parts"], fingerprints, config, run_dir)
    kept.restore(checkpoint)
    if changed:
        kept.progress.first_sample = kept.progress.samples
        logger.info("the data changed: a new epoch over all of it begins at step %d", kept.progress.step)
    logger.info("resumed from %s", checkpoint.path)


def _check_data(before: list[str], now: list[str], config: CheckpointConfig, run_dir: Path) -> bool:
    """Say whether a run goes on with other data than it was begun with; raises unless that was asked for."""
    if before == now:
        return False
    added = len(set(now) - set(before))
    if set(before) <= set(now) and "data.added" not in config.accept_changes:
        raise CheckpointError(
            f"{added} files of tokens were added to the data since {run_dir} was begun; pass checkpoint.accept_changes="
            "[data.added] to begin an epoch over all of it here, or another name= for a new run"
        )
    if not set(before) <= set(now) and "data.fingerprint" not in config.accept_changes:
        raise CheckpointError(
            f"the data or the tokenizer changed since {run_dir} was begun; pass another name= for a new run, or "
            "checkpoint.accept_changes=[data.fingerprint] to go on with the new data"
        )
    return True


def _initialise(
    kept: Restorable, run_config: dict[str, Any], read_hf: Callable[[Path], dict[str, Tensor]], ranks: Ranks
) -> None:
    """Take what `init_content` names from `init_from`: weights, moments, the schedule's place, the data's place."""
    path, content = Path(run_config["init_from"]), set(run_config["init_content"])
    if "all" in content:
        content = {"model", "optimizer", "scheduler", "sampler"}
    check_origin(path)
    if (path / "config.json").exists():
        if content != {"model"}:
            raise CheckpointError(
                f"init_content ({', '.join(sorted(content))}): {path} is a Hugging Face folder and holds a model only"
            )
        kept.take_weights(read_hf(path), path)
        logger.info("weights from %s", path)
        return
    other = open_checkpoint(path, ranks)
    check_same_model(other.state["config"], run_config, other.path)
    if content != {"model"} and not any(name.startswith("optimizer.") for name in other.tensors):
        raise CheckpointError(
            f"init_content ({', '.join(sorted(content))}): {other.path} was brought in and holds a model only"
        )
    before = other.state["progress"]
    for word in ("model", "optimizer"):
        if word in content:
            kept.take(other, f"{word}.")
    if "scheduler" in content:
        kept.progress.updates = before["updates"]
        if other.state["config"]["precision"]["compute"] == run_config["precision"]["compute"]:
            kept.scaler.load_state_dict(other.state["scaler"])  # of another precision it would be no scale
    if "sampler" in content:
        for key in ("step", "samples", "first_sample", "tokens"):
            setattr(kept.progress, key, before[key])
    logger.info("%s from %s", ", ".join(sorted(content)), other.path)
