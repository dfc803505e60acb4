"""Trace of a rank's step: collectives, FLOPs of matrix products, and memory traffic of other operations."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from dry_run.memory import Memory, in_backward

NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional")  # of collectives
KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "send", "recv")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"  # in place of the GPU's fused kernel
FREE = ("empty", "new_empty", "_unsafe_view", "detach", "alias", "lift_fresh", "_record_function")  # no traffic


@dataclass(frozen=True, slots=True)
class Collective:
    kind: str
    axis: str  # of the mesh; several are joined by +
    ranks: tuple[int, ...]
    n_bytes: int  # of the full tensor: gathered, or before the scatter
    overlaps: bool  # with compute


@dataclass(slots=True)
class Phase:
    """Operations between two switches from forward to backward, or back."""

    backward: bool
    update: bool = False  # of the optimizer
    flops: int = 0
    attention_flops: int = 0  # among `flops`
    fp8_flops: int = 0  # among `flops`
    n_bytes: int = 0  # read and written by operations other than matrix products
    collectives: list[Collective] = field(default_factory=list)


class Trace(TorchDispatchMode):
    """Tracks the memory of operations on plain tensors, and records the operations while `recording` is set.

    `axes` are the sizes of the mesh axes, outermost first.
    """

    def __init__(self, axes: dict[str, int], memory: Memory) -> None:
        super().__init__()
        self.axes, self.memory = axes, memory
        self.phases = [Phase(backward=False)]
        self.recording = self.paused = False
        self.products_only = False  # record only matrix products and collectives
        self.overlaps = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(map(is_traceable_wrapper_subclass_type, types)):  # such as DTensor
            return NotImplemented  # its operations on local tensors are traced
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace != "prim" and not self.paused:  # queries such as a tensor's device
            self.memory.record(result, is_collective=func.namespace in NAMESPACES)
            if self.recording:
                self._record(func, args, kwargs, result)
        return result

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if in_backward() != self.phases[-1].backward:
            self.phases.append(Phase(in_backward()))
        phase, packet = self.phases[-1], func._overloadpacket
        if func.namespace in NAMESPACES:
            name, parts = packet.__name__.replace("_", ""), [*args, *kwargs.values()]
            kind = next((kind for kind in KINDS if kind.replace("_", "") in name), None)
            if kind is not None:  # not a wait or barrier
                self.add_collective(kind, _group_of(parts), max(map(n_bytes, [*parts, result])))
        elif packet.__name__.startswith(ATTENTION):
            flops = _attention_flops(args, backward=packet.__name__.endswith("backward"))
            phase.flops += flops
            phase.attention_flops += flops
        elif packet in flop_registry:
            tensors = [arg for arg in args if isinstance(arg, Tensor)]  # an output's dtype may follow them
            flops = flop_registry[packet](*tensors, out_val=result)
            phase.flops += flops
            phase.fp8_flops += flops if packet is torch.ops.aten._scaled_mm else 0
        elif not self.products_only and not func.is_view and not packet.__name__.startswith(FREE):
            self.record_kernel([args, [kwargs[key] for key in kwargs if key != "out"], result])

    def overlapped(self) -> Any:
        """Return a context manager that marks collectives as overlapping with compute."""
        return mock.patch.object(self, "overlaps", True)

    def record_kernel(self, args: Sequence[Any]) -> None:
        """Record a kernel that reads or writes each tensor once."""
        self.phases[-1].n_bytes += n_bytes(args)

    def collectives(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Return count and bytes by (axis, kind)."""
        table: dict[tuple[str, str], tuple[int, int]] = {}
        for item in (item for phase in self.phases for item in phase.collectives):
            count, total = table.get((item.axis, item.kind), (0, 0))
            table[item.axis, item.kind] = count + 1, total + item.n_bytes
        return dict(sorted(table.items()))

    def add_collective(self, kind: str, group: dist.ProcessGroup, n_bytes: int) -> None:
        ranks = tuple(dist.get_process_group_ranks(group))
        if len(ranks) > 1:
            axis = axis_of(ranks, self.axes)
            self.phases[-1].collectives.append(Collective(kind, axis, ranks, n_bytes, self.overlaps))


def _group_of(args: Sequence[Any]) -> dist.ProcessGroup:
    """Return the process group among a collective's arguments, given by name or boxed."""
    for arg in reversed(args):  # a reduction's name may precede the group's
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


def _attention_flops(args: Any, *, backward: bool) -> int:
    """Count 2 matrix products forward and 5 backward, halved if attention is causal."""
    count, n_tensors, causal = (sdpa_backward_flop_count, 4, args[7]) if backward else (sdpa_flop_count, 3, args[4])
    return count(*(arg.shape for arg in args[:n_tensors])) // (2 if causal else 1)


def n_bytes(tree: Any) -> int:
    """Return the bytes of all tensors in a nested container."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
