"""A copy of an optimizer's tensors in the host's memory, from which a checkpoint is written while training goes on."""

from copy import copy
from typing import Any

from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from training.config import TrainingError
from training.optim.optimizer import Optimizer


class Snapshot:
    """Host memory for an optimizer's tensors, allocated once; pinned, so that a GPU copies at full speed."""

    def __init__(self, optimizer: Optimizer) -> None:
        on_gpu = optimizer.device.type == "cuda"
        self.optimizer = optimizer
        self.stager = DefaultStager(StagingOptions(on_gpu, False, False, on_gpu))

    def take(self) -> Optimizer:
        """Return an optimizer that holds the tensors as they are now, until the next call."""
        taken, weights = copy(self.optimizer), copy(self.optimizer.weights)
        held = {
            "shards": weights.shards,
            "remainder": weights.remainder,
            "state": taken.state,
            "updates": taken.updates,
        }
        try:
            copies: Any = self.stager.stage(held)
        except RuntimeError as error:
            what = f"the tensors cannot be copied to the host's memory: {error}"
            raise TrainingError(f"{what}; pass checkpoint.asynchronous=false") from error
        weights.shards, weights.remainder = copies["shards"], copies["remainder"]
        taken.weights, taken.state, taken.updates = weights, copies["state"], copies["updates"]
        return taken
