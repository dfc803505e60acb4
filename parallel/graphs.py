"""A step's launches as CUDA graphs: recorded once, and from then on given to the device all at once.

Where kernels are short, a step lasts as long as the host takes to launch them one by one. What is recorded reads and
writes the same memory every time: a micro-batch is copied to where the recorded one lay, gradients stay where they are.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FIELDS = ("tokens_BT", "labels_BT", "positions_BT", "source_BT")


@dataclass(slots=True)
class Place:
    """Memory on the device that micro-batches of one shape are copied to, and what is said of them."""

    tokens_BT: Tensor
    labels_BT: Tensor
    positions_BT: Tensor
    source_BT: Tensor
    cu_seqlens: Tensor  # behind the last segment come empty ones
    max_seq_len: int
    weight: Tensor  # of a target token, scalar

    def fill(self, batch: Any, weight: float) -> None:
        for name in FIELDS:
            getattr(self, name).copy_(getattr(batch, name), non_blocking=True)
        n = len(batch.cu_seqlens)
        self.cu_seqlens[:n].copy_(batch.cu_seqlens, non_blocking=True)
        self.cu_seqlens[n:].fill_(batch.tokens_BT.numel())
        self.weight.fill_(weight)


class Recorded:
    """Something to do on a device over and over.

    It is done by itself the first time, which compiles its kernels, recorded the second, and replayed from then on.
    Without a stream nothing is recorded.
    """

    def __init__(self, body: Callable[[], None], stream: Any, pool: Any) -> None:
        self.body, self.stream, self.pool = body, stream, pool
        self.graph: Any = None
        self.done = False

    def __call__(self) -> None:
        if self.stream is None:
            self.body()
        elif not self.done:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.body()
            torch.cuda.current_stream().wait_stream(self.stream)
            self.done = True
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                # Other threads, such as the one that pins batches, may call what this one may not meanwhile.
                how: Any = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
                with torch.cuda.graph(self.graph, **how):
                    self.body()
            self.graph.replay()


class Graphs:
    """Runs the steps of an engine: a graph for each shape of micro-batches, and one for the update.

    `run(place, weight, sums)` makes a micro-batch's passes, `update(sums)` the rest of a step, of which it gives what
    `results` are like; `sums` are added to, and zeroed here. Nothing of them may need the host.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        run: Callable[[Any, Tensor, Any], None],
        update: Callable[[Any], Sequence[Tensor]],
        sums: Any,
        results: Sequence[Tensor],
        stream: Any,
    ) -> None:
        self.params = list(params)
        # An empty pool of its own: what one graph needs for a while is free for the next one.
        self.stream, self.pool = stream, None if stream is None else torch.cuda.graph_pool_handle()
        self.run, self.sums, self.results = run, sums, list(results)
        dtypes = [getattr(param, "grad_dtype", None) or param.dtype for param in self.params]
        self.grads = [torch.zeros_like(p, dtype=dtype) for p, dtype in zip(self.params, dtypes, strict=True)]
        self.passes: dict[tuple[Any, ...], tuple[Place, Recorded]] = {}
        self.update = Recorded(lambda: self._update(update), stream, self.pool)

    def step(self, batches: Sequence[Any], weights: Sequence[float]) -> list[Tensor]:
        """Run a step's micro-batches and its update; gives the results, which are the caller's."""
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad
        for batch, weight in zip(batches, weights, strict=True):
            place, passes = self._passes_of(batch)
            place.fill(batch, weight)
            passes()
        self.update()
        return [result.clone() for result in self.results]

    def _update(self, update: Callable[[Any], Sequence[Tensor]]) -> None:
        for result, found in zip(self.results, update(self.sums), strict=True):
            result.copy_(found)
        torch._foreach_zero_(self.grads)  # type: ignore[attr-defined]
        self.sums.loss.zero_()
        self.sums.totals_S4.zero_()

    def _passes_of(self, batch: Any) -> tuple[Place, Recorded]:
        """Find what runs a micro-batch: one place for all packs of a shape whose segments fit into it."""
        rows, row_len = batch.tokens_BT.shape
        segments, longest = len(batch.cu_seqlens) - 1, batch.max_seq_len
        if segments * longest != rows * row_len:  # which would be equal segments
            # As many as a power of two, more than rows, and any of them as long as a row: so packs share few graphs.
            segments, longest = 1 << max(segments - 1, rows).bit_length(), row_len
        key = (rows, row_len, segments, longest)
        if key not in self.passes:
            device = self.sums.loss.device
            fields = {name: torch.empty_like(getattr(batch, name), device=device) for name in FIELDS}
            cu_seqlens = torch.zeros(segments + 1, dtype=batch.cu_seqlens.dtype, device=device)
            place = Place(**fields, cu_seqlens=cu_seqlens, max_seq_len=longest, weight=torch.zeros((), device=device))
            self.passes[key] = place, Recorded(lambda: self.run(place, place.weight, self.sums), self.stream, self.pool)
        return self.passes[key]
