"""Memory of a step by kind, tracked by storage as the CUDA allocator would."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from parallel.zero import Zero

BLOCK = 512  # bytes; the CUDA allocator rounds requests up to a multiple
BACKWARD = "activation gradients"
KINDS = ("parameters", "gradients", "optimizer", "activations", "logits", "communication")


@dataclass(slots=True, eq=False)
class Allocation:
    n_bytes: int
    kind: str
    begin: int  # in operations
    end: int | None = None  # None: still allocated


class Memory:
    """Tracks every storage from allocation to free.

    New storages have the kind that `label` has set. In a backward pass they are gradients of activations, or of
    parameters if they outlive the pass.
    """

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self.now = 0  # in operations
        self.live_bytes = self.peak_bytes = self.peak_at = 0
        self.kind = "activations"
        self._backward = False
        self._by_storage: dict[int, Allocation] = {}  # by id

    def label(self, kind: str) -> Any:
        """Return a context manager and decorator that sets the kind of new storages."""
        return mock.patch.object(self, "kind", kind)

    @contextmanager
    def following_zero(self) -> Iterator[None]:
        """Track ZeRO, which frees and reallocates gathered parameters by resizing storages, not by operations.

        What it allocates at the end of a module's backward pass is gradients, even outside of autograd's.
        """
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            allocation = self._by_storage.get(id(storage))
            result = resize(storage, size)
            if allocation is not None:
                self._free(id(storage), allocation)
                self._allocate(storage, "parameters")
            return result

        patch, reduce = mock.patch.object, self.label("gradients")(Zero._reduce)
        with patch(torch.UntypedStorage, "resize_", resize_), patch(Zero, "_reduce", reduce):
            yield

    def record(self, result: Any, *, is_collective: bool) -> None:
        """Track the results of an operation."""
        self.now += 1
        backward = in_backward()
        if self._backward and not backward:
            for allocation in self._by_storage.values():
                if allocation.kind == BACKWARD:
                    allocation.kind = "gradients"
        self._backward = backward
        kind = BACKWARD if backward and self.kind not in ("logits", "gradients") else self.kind
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf, "communication" if is_collective else kind)

    def relabel(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Change the kind of tensors' storages."""
        for tensor in tensors:
            self._follow(tensor, kind).kind = kind

    def reset_peak(self) -> None:
        self.peak_bytes, self.peak_at = self.live_bytes, self.now

    def bytes_at_peak(self) -> dict[str, int]:
        """Return the bytes by kind at the peak."""
        found: dict[str, int] = dict.fromkeys(KINDS, 0)
        for allocation in self.allocations:
            if allocation.begin <= self.peak_at and (allocation.end is None or allocation.end >= self.peak_at):
                found["activations" if allocation.kind == BACKWARD else allocation.kind] += allocation.n_bytes
        return found

    def _follow(self, tensor: Tensor, kind: str) -> Allocation:
        """Return the allocation of a tensor's storage, creating one of this kind if necessary."""
        storage = tensor.untyped_storage()
        return self._by_storage.get(id(storage)) or self._allocate(storage, kind)

    def _allocate(self, storage: torch.UntypedStorage, kind: str) -> Allocation:
        allocation = Allocation(-(-storage.nbytes() // BLOCK) * BLOCK, kind, self.now)
        self.allocations.append(allocation)
        self._by_storage[id(storage)] = allocation
        weakref.finalize(storage, self._free, id(storage), allocation)
        self.live_bytes += allocation.n_bytes
        if self.live_bytes > self.peak_bytes:
            self.reset_peak()
        return allocation

    def _free(self, key: int, allocation: Allocation) -> None:
        if allocation.end is None:
            allocation.end = self.now
            self.live_bytes -= allocation.n_bytes
        if self._by_storage.get(key) is allocation:
            del self._by_storage[key]


def in_backward() -> bool:
    """Return whether autograd is running a backward pass."""
    return torch._C._current_graph_task_id() != -1
