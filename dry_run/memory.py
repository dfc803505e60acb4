"""Bytes that a step allocates, by what they are for, read off the operations as the allocator would see them."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from dry_run.trace import in_backward

BLOCK = 512  # the CUDA allocator rounds each request up to it
COMMUNICATION = ("c10d", "_c10d_functional", "fsdp")
BACKWARD = "activation gradients"
AT_PEAK = ("parameters", "gradients", "optimizer", "activations", "logits", "communication")


@dataclass(slots=True, eq=False)
class Piece:
    """One allocation, from one operation to another."""

    n_bytes: int
    kind: str
    begin: int
    end: int | None = None  # None: still there


class Memory:
    """Follows every storage of a process from its first tensor to its last.

    A piece is of the kind that `holding` was last given. In the backward pass it is one of activations, and
    called a gradient of parameters once it has outlived the pass.
    """

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.now = 0  # in operations
        self.live = 0
        self.peak = 0
        self.peak_at = 0
        self._kind = "activations"
        self._backward = False
        self._storages: dict[int, Piece] = {}  # by id of the storage

    @contextmanager
    def holding(self, kind: str) -> Iterator[None]:
        """Say what the storages made from here on are for."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    @contextmanager
    def following(self) -> Iterator[None]:
        """Notice also what FSDP does without an operation: it frees gathered parameters and makes room for them."""
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            piece = self._storages.pop(id(storage), None)
            result = resize(storage, size)
            if piece is not None:
                self._close(piece)
                self._open(storage, "parameters")
            return result

        with mock.patch.object(torch.UntypedStorage, "resize_", resize_):
            yield

    def saw(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        self.now += 1
        if self._backward and not in_backward():
            self._end_backward()
        self._backward = in_backward()
        kind = "communication" if func.namespace in COMMUNICATION else self._label()
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor):
                self.note(leaf, kind)
        if func is torch.ops.fsdp.split_with_sizes_copy.default:  # the parameters that were gathered
            self.rename(kwargs["out"], "parameters")

    def note(self, tensor: Tensor, kind: str) -> None:
        """Follow a tensor's storage from now on, if it is not followed yet; a known one keeps its kind."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._storages:
            self._open(storage, kind)

    def rename(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say what tensors that are followed already are for."""
        for tensor in tensors:
            part: Any = tensor
            while is_traceable_wrapper_subclass(part):
                part = getattr(part, part.__tensor_flatten__()[0][0])
            self.note(part, kind)
            self._storages[id(part.untyped_storage())].kind = kind

    def forget_peak(self) -> None:
        """Look for the most from here on."""
        self.peak, self.peak_at = self.live, self.now

    def at_peak(self) -> dict[str, int]:
        """Give the bytes at the moment of the most, by kind."""
        found: dict[str, int] = dict.fromkeys(AT_PEAK, 0)
        for piece in self.pieces:
            if piece.begin <= self.peak_at and (piece.end is None or piece.end >= self.peak_at):
                found["activations" if piece.kind == BACKWARD else piece.kind] += piece.n_bytes
        return found

    def _label(self) -> str:
        return BACKWARD if in_backward() and self._kind != "logits" else self._kind

    def _end_backward(self) -> None:
        for piece in self._storages.values():
            if piece.kind == BACKWARD:
                piece.kind = "gradients"

    def _open(self, storage: torch.UntypedStorage, kind: str) -> None:
        piece = Piece(-(-storage.nbytes() // BLOCK) * BLOCK, kind, self.now)
        self.pieces.append(piece)
        self._storages[id(storage)] = piece
        weakref.finalize(storage, self._forget, id(storage), piece)
        self.live += piece.n_bytes
        if self.live > self.peak:
            self.peak, self.peak_at = self.live, self.now

    def _close(self, piece: Piece) -> None:
        if piece.end is None:
            piece.end = self.now
            self.live -= piece.n_bytes

    def _forget(self, key: int, piece: Piece) -> None:
        self._close(piece)
        if self._storages.get(key) is piece:
            del self._storages[key]
