"""A copy of an optimizer's tensors in the host's memory, from which a checkpoint is written while training goes on."""

from copy import copy

import torch
from torch import Tensor

from training.config import TrainingError
from training.optim.optimizer import Optimizer

ALIGNED_TO = 64  # bytes


class Snapshot:
    """Host memory for an optimizer's tensors, allocated once; pinned, so that a GPU copies at full speed."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.copies: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def take(self) -> Optimizer:
        """Return an optimizer that holds the tensors as they are now, until the next call."""
        taken, weights = copy(self.optimizer), copy(self.optimizer.weights)
        held = [weights.shards, weights.remainder, {"": taken.updates}, *taken.state.values()]
        self.copies = self.copies or self._allocate(held)
        for copies, tensors in zip(self.copies, held, strict=True):
            for name, tensor in tensors.items():
                copies[name].copy_(tensor, non_blocking=True)
        weights.shards, weights.remainder, updates, *states = self.copies
        taken.weights, taken.updates, taken.state = weights, updates[""], dict(zip(taken.state, states, strict=True))
        if taken.device.type == "cuda":
            torch.cuda.current_stream(taken.device).synchronize()
        return taken

    def _allocate(self, held: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Return memory for tensors, all in one block, because each that is pinned by itself is rounded up."""
        sizes = [-(-tensor.nbytes // ALIGNED_TO) * ALIGNED_TO for tensors in held for tensor in tensors.values()]
        block = torch.empty(sum(sizes), dtype=torch.uint8)
        if self.optimizer.device.type == "cuda":
            failed = int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0))
            if failed:
                what = f"the host cannot pin {block.nbytes:,} bytes (CUDA error {failed})"
                raise TrainingError(f"{what}; pass checkpoint.asynchronous=false")
        parts = iter(block.split(sizes))

        def like(tensor: Tensor) -> Tensor:
            return next(parts)[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)

        return [{name: like(tensor) for name, tensor in tensors.items()} for tensors in held]
