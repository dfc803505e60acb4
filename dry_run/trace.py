"""Trace of what one rank issues in a step: collectives, FLOPs of products, bytes that other operations move."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional")  # of collectives
KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "send", "recv")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"  # stands for the fused kernel of a GPU
FREE = ("empty", "new_empty", "_unsafe_view", "detach", "alias", "lift_fresh", "_record_function")  # no traffic


@dataclass(frozen=True, slots=True)
class Collective:
    kind: str
    axis: str  # of the mesh; several are joined by +
    ranks: tuple[int, ...]
    n_bytes: int  # of the whole tensor: gathered, or not yet scattered
    overlaps: bool  # with what else is issued


@dataclass(slots=True)
class Phase:
    """What is issued between two changes from forward to backward, or back."""

    backward: bool
    update: bool = False  # the optimizer's
    flops: int = 0
    n_bytes: int = 0  # read and written by other operations than products
    collectives: list[Collective] = field(default_factory=list)


class ObserveOps(TorchDispatchMode):
    """Calls `observers` as `observer(func, args, kwargs, result)` after each operation on plain tensors."""

    def __init__(self, *observers: Callable[[Any, Any, Any, Any], None]) -> None:
        super().__init__()
        self.observers = list(observers)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(map(is_traceable_wrapper_subclass_type, types)):  # such as DTensor
            return NotImplemented  # operations on its local tensors arrive on their own
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace != "prim":  # queries such as a tensor's device
            for observer in self.observers:
                observer(func, args, kwargs, result)
        return result


class Trace:
    """Records what is issued, in order, on a mesh of these axes and sizes, outermost first."""

    def __init__(self, axes: dict[str, int]) -> None:
        self.axes = axes
        self.phases = [Phase(backward=False)]
        self.products_only = False  # record nothing but products and collectives
        self.overlaps = False

    def record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if in_backward() != self.phases[-1].backward:
            self.phases.append(Phase(in_backward()))
        phase, packet = self.phases[-1], func._overloadpacket
        if func.namespace in NAMESPACES:
            self._record_collective(packet.__name__, args, kwargs, result)
        elif packet.__name__.startswith(ATTENTION):
            phase.flops += _attention_flops(args, backward=packet.__name__.endswith("backward"))
        elif packet in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = [arg for arg in args if isinstance(arg, Tensor)][-2:]  # a dtype may follow them
            phase.flops += 2 * left.numel() * right.shape[1]
        elif packet in flop_registry:
            phase.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        elif not self.products_only and not func.is_view and not packet.__name__.startswith(FREE):
            self.record_kernel([args, [kwargs[key] for key in kwargs if key != "out"], result])

    @contextmanager
    def overlapped(self) -> Iterator[None]:
        """Mark the collectives issued within as ones that run beside computing."""
        self.overlaps = True
        yield
        self.overlaps = False

    def record_kernel(self, args: Sequence[Any]) -> None:
        """Record a kernel that reads or writes each of its tensors once."""
        self.phases[-1].n_bytes += n_bytes(args)

    def collectives(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Return count and bytes by (axis, kind)."""
        table: dict[tuple[str, str], tuple[int, int]] = {}
        for item in (item for phase in self.phases for item in phase.collectives):
            count, total = table.get((item.axis, item.kind), (0, 0))
            table[item.axis, item.kind] = count + 1, total + item.n_bytes
        return dict(sorted(table.items()))

    def _record_collective(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        kind = next((kind for kind in KINDS if kind.replace("_", "") in name.replace("_", "")), None)
        if kind is None:  # waits and barriers
            return
        parts = [*args, *kwargs.values()]
        self.add_collective(kind, _group_of(parts), max(map(n_bytes, [*parts, result])))

    def add_collective(self, kind: str, group: dist.ProcessGroup, n_bytes: int) -> None:
        """Add a collective of `n_bytes` over a group."""
        ranks = tuple(dist.get_process_group_ranks(group))
        if len(ranks) > 1:
            axis = axis_of(ranks, self.axes)
            self.phases[-1].collectives.append(Collective(kind, axis, ranks, n_bytes, self.overlaps))


def _group_of(args: Sequence[Any]) -> dist.ProcessGroup:
    """Find the process group among a collective's arguments: a name, or boxed."""
    for arg in reversed(args):  # the reduction's name may come before the group's
        if isinstance(arg, str):
            return dist.distributed_c10d._resolve_process_group(arg)  # type: ignore[arg-type]
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg)
    raise AssertionError("a collective without a process group")


def axis_of(ranks: Sequence[int], axes: dict[str, int]) -> str:
    """Return the mesh axes that a group's ranks differ in, joined by +; `axes` are the sizes, outermost first."""
    stride, varying = prod(axes.values()), []
    for name, size in axes.items():
        stride //= size
        if len({rank // stride % size for rank in ranks}) > 1:
            varying.append(name)
    return "+".join(varying)


def in_backward() -> bool:
    """Return whether autograd is running a backward pass."""
    return torch._C._current_graph_task_id() != -1


def _attention_flops(args: Any, *, backward: bool) -> int:
    """Count 2 products forward and 5 backward, each over half of the square if attention is causal."""
    count, n_tensors, causal = (sdpa_backward_flop_count, 4, args[7]) if backward else (sdpa_flop_count, 3, args[4])
    return count(*(arg.shape for arg in args[:n_tensors])) // (2 if causal else 1)


def n_bytes(tree: Any) -> int:
    """Return the bytes of all tensors in a tensor or a nested container."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
