"""What one rank does in a step, read off the operations it issues: collectives, products, memory.

Works on fake ranks and fake tensors, so that a step of a thousand GPUs can be read on none.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

KINDS = {
    "all_gather": ("allgather", "all_gather"),
    "reduce_scatter": ("reduce_scatter",),
    "all_reduce": ("allreduce", "all_reduce"),
    "all_to_all": ("alltoall", "all_to_all"),
    "broadcast": ("broadcast",),
    "send": ("send",),
    "recv": ("recv",),
}
# Operations of these namespaces talk to other ranks.
NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional")


@dataclass(frozen=True, slots=True)
class Collective:
    """One message between ranks; its bytes are those of the whole tensor, gathered or not yet scattered."""

    kind: str
    axis: str  # of the mesh; several are joined by +
    ranks: tuple[int, ...]
    n_bytes: int
    phase: str


def axis_of(ranks: Sequence[int], axes: dict[str, int]) -> str:
    """Name the mesh axes that a group's ranks differ in; `axes` are the sizes, outermost first."""
    names, sizes = list(axes), list(axes.values())
    strides = [prod(sizes[i + 1 :]) for i in range(len(sizes))]
    varying = [
        name
        for name, size, stride in zip(names, sizes, strides, strict=True)
        if len({rank // stride % size for rank in ranks}) > 1
    ]
    return "+".join(varying)


class Ledger(TorchDispatchMode):
    """Counts collectives and FLOPs by the phase of the step they are issued in.

    A phase is what `during` was last given, with " backward" behind it inside the backward pass.
    """

    def __init__(self, axes: dict[str, int]) -> None:
        super().__init__()
        self.axes = axes
        self.collectives: list[Collective] = []
        self.flops: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()  # bytes that other operations than products read and write
        self._phase = ""
        self._groups: dict[str, tuple[str, tuple[int, ...]]] = {}

    @property
    def phase(self) -> str:
        return f"{self._phase} backward" if torch._C._current_graph_task_id() != -1 else self._phase

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its parts come by here on their own
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if func.namespace in NAMESPACES:
            self._count_collective(func, args, kwargs, result)
        elif packet in flop_registry:
            self.flops[self.phase] += flop_registry[packet](*args, **kwargs, out_val=result)
        elif not func.is_view:
            parts = [*tree_leaves(args), *tree_leaves(kwargs), *tree_leaves(result)]
            self.moved[self.phase] += sum(_n_bytes(part) for part in parts)
        return result

    def table(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Give count and bytes by (axis, kind)."""
        sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        for item in self.collectives:
            entry = sums[item.axis, item.kind]
            entry[0] += 1
            entry[1] += item.n_bytes
        return {key: (count, n_bytes) for key, (count, n_bytes) in sorted(sums.items())}

    def _count_collective(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = func._overloadpacket.__name__
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), None)
        if kind is None:  # waits and barriers carry nothing
            return
        axis, ranks = self._group(args, kwargs)
        if len(ranks) > 1:
            parts = [*args, *kwargs.values(), result]
            n_bytes = max(sum(_n_bytes(leaf) for leaf in tree_leaves(part)) for part in parts)
            self.collectives.append(Collective(kind, axis, ranks, n_bytes, self.phase))

    def _group(self, args: Any, kwargs: Any) -> tuple[str, tuple[int, ...]]:
        """Find an operation's process group among its arguments: by name, or boxed."""
        for part in [*args, *kwargs.values()]:
            if isinstance(part, str):
                name, group = part, None
            elif isinstance(part, torch.ScriptObject) and "ProcessGroup" in str(part._type()):
                group = dist.ProcessGroup.unbox(part)
                name = group.group_name
            else:
                continue
            if name not in self._groups:
                group = group or dist.distributed_c10d._resolve_process_group(name)
                ranks = tuple(dist.get_process_group_ranks(group))
                self._groups[name] = axis_of(ranks, self.axes), ranks
            return self._groups[name]
        raise AssertionError("a collective without a group")


def _n_bytes(leaf: Any) -> int:
    return leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else 0
