"""A copy of an optimizer's tensors in the host's memory, from which a checkpoint is written while training goes on."""

from copy import copy

import torch
from torch import Tensor

from training.optim.optimizer import Optimizer


class Snapshot:
    """Host memory for an optimizer's tensors, allocated once; pinned, so that a GPU copies at full speed."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.copies: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def take(self) -> Optimizer:
        """Return an optimizer that holds the tensors as they are now, until the next call."""
        self.allocate()
        for copies, tensors in zip(self.copies, self._held(), strict=True):
            for name, tensor in tensors.items():
                copies[name].copy_(tensor, non_blocking=True)
        taken, weights = copy(self.optimizer), copy(self.optimizer.weights)
        weights.shards, weights.remainder, updates, *states = self.copies
        taken.weights, taken.updates, taken.state = weights, updates[""], dict(zip(taken.state, states, strict=True))
        if taken.device.type == "cuda":
            torch.cuda.current_stream(taken.device).synchronize()
        return taken

    def allocate(self) -> None:
        """Allocate the memory, unless that was done."""
        if not self.copies:
            pinned = {"device": "cpu", "pin_memory": self.optimizer.device.type == "cuda"}
            held = self._held()
            self.copies = [{name: torch.empty_like(t, **pinned) for name, t in tensors.items()} for tensors in held]

    def _held(self) -> list[dict[str, Tensor]]:
        weights, updates, states = self.optimizer.weights, self.optimizer.updates, self.optimizer.state.values()
        return [weights.shards, weights.remainder, {"": updates}, *states]
