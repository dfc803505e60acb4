"""CUDA graphs of a training step, for models whose kernels are too short for the host to launch one by one.

A graph always uses the same memory: micro-batches are copied into static tensors, and gradients stay in place.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from data.batches import Batch
from parallel.mesh import GRAPHS
from parallel.zero import Zero

if TYPE_CHECKING:
    from parallel.engine import Sums

FIELDS = ("tokens_BT", "labels_BT", "positions_BT", "source_BT")


class Position(NamedTuple):
    """What collectives depend on of a micro-batch's position in its step."""

    is_first: bool
    is_last: bool

    @classmethod
    def all_of(cls, n: int) -> "list[Position]":
        """Return the positions of a step's `n` micro-batches."""
        return [cls(index == 0, index == n - 1) for index in range(n)]


class Recorded:
    """A function that runs eagerly once, to compile its kernels, and then as a CUDA graph if there is a stream."""

    def __init__(
        self,
        function: Callable[[], None],
        stream: torch.cuda.Stream | None,
        pool: Any,
        may_capture: Callable[[], bool] = lambda: True,
    ) -> None:
        self.function, self.stream, self.pool, self.may_capture = function, stream, pool, may_capture
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False

    def __call__(self) -> None:
        eager, self.warm = not self.warm or (self.graph is None and not self.may_capture()), True
        if self.stream is None:
            return self.function()
        if eager:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.function()
            return torch.cuda.current_stream().wait_stream(self.stream)
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            GRAPHS.add(graph)  # first: a capture that fails may have recorded collectives
            # Other threads, such as the one that pins batches, may call CUDA during the capture.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                self.function()
            self.graph = graph
        self.graph.replay()


class Graphs:
    """Runs the steps of an engine with a graph per micro-batch shape, and one for the update.

    `run(batch, weight, sums, position)` runs forward and backward and adds to `sums`, which are zeroed here;
    `update(sums)` is the rest of a step and returns its figures. Neither may synchronize.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        run: Callable[[Batch, Tensor, "Sums", Position], None],
        update: Callable[["Sums"], Sequence[Tensor]],
        sums: "Sums",
        stream: torch.cuda.Stream | None,
        zero: Zero | None = None,
    ) -> None:
        self.params = list(params) if zero is None else []
        self.grads: list[Tensor] = []  # of `params`, at addresses that the graphs have recorded
        self.zero = zero
        if zero is not None:
            zero.in_graphs = True
        # Graphs share a pool, because they run one after another.
        self.stream, self.pool = stream, None if stream is None else torch.cuda.graph_pool_handle()
        self.run, self.sums = run, sums
        self.figures: list[Tensor] = []
        self.passes: dict[tuple[object, ...], tuple[Batch, Tensor, Recorded]] = {}
        self.update = Recorded(partial(self._update, update), stream, self.pool)

    def step(self, batches: Sequence[Batch], weights: Sequence[float], aux_weight: float) -> list[Tensor]:
        """Run a step's micro-batches and its update; return copies of the figures."""
        self._set_grads(self.grads)
        self.sums.aux_weight.fill_(aux_weight)
        for batch, weight, position in zip(batches, weights, Position.all_of(len(batches)), strict=True):
            static, static_weight, passes = self._passes_of(batch, position)
            for name in FIELDS:
                getattr(static, name).copy_(getattr(batch, name), non_blocking=True)
            n = len(batch.cu_seqlens)
            static.cu_seqlens[:n].copy_(batch.cu_seqlens, non_blocking=True)
            static.cu_seqlens[n:].fill_(batch.tokens_BT.numel())  # empty segments
            static_weight.fill_(weight)
            passes()
        self.update()
        return [figure.clone() for figure in self.figures]

    def _update(self, update: Callable[["Sums"], Sequence[Tensor]]) -> None:
        figures = update(self.sums)
        self.figures = self.figures or [torch.empty_like(figure) for figure in figures]  # allocated in the eager run
        for static, figure in zip(self.figures, figures, strict=True):
            static.copy_(figure)
        self.sums.zero_()

    def _passes(self, batch: Batch, weight: Tensor, position: Position) -> None:
        """Run a micro-batch. The pass that allocates the gradients writes them; others add to them."""
        adopts = position.is_first and not self.grads
        if adopts:
            self._set_grads([None] * len(self.params))
        elif position.is_first:
            torch._foreach_zero_(self.grads)  # type: ignore[attr-defined]
        self.run(batch, weight, self.sums, position)
        if adopts:
            grads = [zero_grad(param) if param.grad is None else param.grad for param in self.params]
            self._set_grads(grads)
            if self.update.warm:  # graphs are captured from here on, with these addresses
                self.grads = grads

    def _set_grads(self, grads: Sequence[Tensor | None]) -> None:
        for param, grad in zip(self.params, grads, strict=False):
            param.grad = grad

    def _passes_of(self, batch: Batch, position: Position) -> tuple[Batch, Tensor, Recorded]:
        """Return static batch, static weight and graph for a micro-batch, shared by all that fit."""
        rows, row_len = batch.tokens_BT.shape
        segments, longest = len(batch.cu_seqlens) - 1, batch.max_seq_len
        if segments * longest != rows * row_len:  # segments of different lengths
            # Round up to a power of two of segments of up to a row, so that packs share a few graphs.
            segments, longest = 1 << max(segments - 1, rows).bit_length(), row_len
        key = (rows, row_len, segments, longest, position if self.zero else position.is_first)
        if key not in self.passes:
            device = self.sums.loss.device
            fields = {name: torch.empty_like(getattr(batch, name), device=device) for name in FIELDS}
            cu_seqlens = torch.zeros(segments + 1, dtype=batch.cu_seqlens.dtype, device=device)
            static, weight = Batch(**fields, cu_seqlens=cu_seqlens, max_seq_len=longest), torch.zeros((), device=device)
            run = partial(self._passes, static, weight, position)
            # A graph captured before gradients have their final addresses would write to freed memory.
            recorded = Recorded(run, self.stream, self.pool, lambda: not self.params or self.update.warm)
            self.passes[key] = static, weight, recorded
        return self.passes[key]


def zero_grad(param: Tensor) -> Tensor:
    """Return a gradient of zeros, in the dtype that autograd accumulates in."""
    return torch.zeros_like(param, dtype=getattr(param, "grad_dtype", None) or param.dtype)
