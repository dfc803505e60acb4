"""What one rank does in a step, read off the operations it issues: collectives, products, memory.

Works on fake ranks and fake tensors, so that a step of a thousand GPUs can be read on none.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
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
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"  # what a fused kernel is without a GPU
# Operations that touch no memory
FREE = ("empty", "new_empty", "_unsafe_view", "detach", "alias", "lift_fresh", "_record_function")


@dataclass(frozen=True, slots=True)
class Collective:
    """One message between ranks; its bytes are those of the whole tensor, gathered or not yet scattered."""

    kind: str
    axis: str  # of the mesh; several are joined by +
    ranks: tuple[int, ...]
    n_bytes: int


@dataclass(slots=True)
class Window:
    """What is issued between two turns from forward to backward, or back."""

    backward: bool
    flops: int = 0
    n_bytes: int = 0  # that other operations than products read and write
    collectives: list[Collective] = field(default_factory=list)


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


def ranks_of(axis: str, axes: dict[str, int]) -> tuple[int, ...]:
    """Give the ranks of rank 0's group over the named axes; `axes` are the sizes, outermost first."""
    ranks = [0]
    sizes = list(axes.values())
    for i, name in enumerate(axes):
        if name in axis.split("+"):
            stride = prod(sizes[i + 1 :])
            ranks = [rank + step * stride for rank in ranks for step in range(sizes[i])]
    return tuple(sorted(ranks))


class Observer(Protocol):
    """Whoever is told of every operation on tensors of this rank alone, with its result."""

    def saw(self, func: Any, args: Any, kwargs: Any, result: Any) -> None: ...


class Watch(TorchDispatchMode):
    """Tells observers of every operation."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        super().__init__()
        self.observers = list(observers)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Tell nobody of what is done in here."""
        observers, self.observers = self.observers, []
        try:
            yield
        finally:
            self.observers = observers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(map(is_traceable_wrapper_subclass_type, types)):  # DTensor is one
            return NotImplemented  # its parts come by here on their own
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace != "prim":  # which asks a tensor what it is
            for observer in self.observers:
                observer.saw(func, args, kwargs, result)
        return result


class Ledger:
    """Notes collectives and FLOPs of a rank in the order they are issued."""

    def __init__(self, axes: dict[str, int]) -> None:
        self.axes = axes
        self.windows = [Window(backward=False)]
        self._fused = False
        self._groups: dict[str, tuple[str, tuple[int, ...]]] = {}

    @property
    def collectives(self) -> list[Collective]:
        return [item for window in self.windows for item in window.collectives]

    def saw(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if in_backward() != self.windows[-1].backward:
            self.windows.append(Window(in_backward()))
        window, packet = self.windows[-1], func._overloadpacket
        if func.namespace in NAMESPACES:
            self._count_collective(window, func, args, kwargs, result)
        elif packet.__name__.startswith(ATTENTION):
            window.flops += _attention_flops(args, backward=packet.__name__.endswith("backward"))
        elif packet in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = [part for part in args if isinstance(part, Tensor)][-2:]  # beside them may stand a dtype
            window.flops += 2 * left.numel() * right.shape[1]
        elif packet in flop_registry:
            window.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        elif not self._fused and not func.is_view and not packet.__name__.startswith(FREE):
            moved = (*tree_leaves(args), *(kwargs[key] for key in kwargs if key != "out"), *tree_leaves(result))
            window.n_bytes += sum(map(n_bytes, moved))

    @contextmanager
    def fused(self) -> Iterator[None]:
        """Let only products be noted in here: the rest is one kernel, which `launched` is told of."""
        before, self._fused = self._fused, True
        try:
            yield
        finally:
            self._fused = before

    def launched(self, arguments: Sequence[Any]) -> None:
        """Note a kernel that is no operation of torch's."""
        self.windows[-1].n_bytes += sum(map(n_bytes, arguments))

    def table(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Give count and bytes by (axis, kind)."""
        sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        for item in self.collectives:
            entry = sums[item.axis, item.kind]
            entry[0] += 1
            entry[1] += item.n_bytes
        return {key: (count, total) for key, (count, total) in sorted(sums.items())}

    def _count_collective(self, window: Window, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = func._overloadpacket.__name__
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), None)
        if kind is None:  # waits and barriers carry nothing
            return
        axis, ranks = self._group(args, kwargs)
        if len(ranks) > 1:
            parts = [*args, *kwargs.values(), result]
            whole = max(sum(map(n_bytes, tree_leaves(part))) for part in parts)
            window.collectives.append(Collective(kind, axis, ranks, whole))

    def _group(self, args: Any, kwargs: Any) -> tuple[str, tuple[int, ...]]:
        """Find an operation's process group among its arguments: by name, or boxed."""
        for part in reversed([*args, *kwargs.values()]):  # before its name may stand that of an operation
            if isinstance(part, str):
                name, group = part, None
            elif isinstance(part, torch.ScriptObject) and "ProcessGroup" in str(part._type()):
                group = dist.ProcessGroup.unbox(part)
                name = group.group_name
            else:
                continue
            if name not in self._groups:
                group = group or dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
                ranks = tuple(dist.get_process_group_ranks(group))
                self._groups[name] = axis_of(ranks, self.axes), ranks
            return self._groups[name]
        raise AssertionError("a collective without a group")


def in_backward() -> bool:
    """Say whether autograd is computing gradients just now."""
    return torch._C._current_graph_task_id() != -1


def _attention_flops(args: Any, *, backward: bool) -> int:
    """Count two products forward and five backward, over half of the square if a token sees only those before it."""
    query, key, causal = (args[1], args[2], args[7]) if backward else (args[0], args[1], args[4])
    batch, heads, length, head_dim = query.shape
    square = 2 * batch * heads * length * key.shape[2] * head_dim
    return (5 if backward else 2) * square // (2 if causal else 1)


def n_bytes(leaf: Any) -> int:
    return leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else 0
