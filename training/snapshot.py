"""Copies of an optimizer's tensors in host memory, for background checkpoints by another process."""

import weakref
from copy import copy
from typing import Any

import torch
from torch import Tensor

from training.config import TrainingError
from training.optim.optimizer import Optimizer
from training.writer_process import WriterProcess

ALIGNED_TO = 64  # bytes


class Snapshot:
    """Pinned host memory for an optimizer's tensors, shared with the process that writes them; allocated once."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.copies: list[dict[str, Tensor]] = []
        self.process: WriterProcess | None = None

    @torch.no_grad()
    def take(self) -> Optimizer:
        """Return a copy of the optimizer with the current tensors, valid until the next call."""
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
        """Allocate the memory if necessary, in one block, because every pinned block is rounded up."""
        if self.copies:
            return
        held = self._held()
        sizes = [-(-tensor.nbytes // ALIGNED_TO) * ALIGNED_TO for tensors in held for tensor in tensors.values()]
        self.process = WriterProcess(sum(sizes))
        if self.optimizer.device.type == "cuda":
            self._pin(self.process.block)
        parts = iter(self.process.block.split(sizes))
        self.copies = [
            {n: next(parts)[: t.nbytes].view(t.dtype).view(t.shape) for n, t in tensors.items()} for tensors in held
        ]

    def _held(self) -> list[dict[str, Tensor]]:
        weights, updates, states = self.optimizer.weights, self.optimizer.updates, self.optimizer.state.values()
        return [weights.shards, weights.remainder, {"": updates}, *states]

    def _pin(self, block: Tensor) -> None:
        cuda: Any = torch.cuda.cudart()
        with torch.cuda.device(self.optimizer.device):
            error = int(cuda.cudaHostRegister(block.data_ptr(), block.nbytes, 1))
        if error:
            what = f"the host cannot pin {block.nbytes:,} bytes (CUDA error {error})"
            raise TrainingError(f"{what}; pass checkpoint.asynchronous=false")
        weakref.finalize(self, cuda.cudaHostUnregister, block.data_ptr()).atexit = False
