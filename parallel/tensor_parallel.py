"""Which parameter is divided how over tp, by module path, and how tokens are shared among those who attend to them."""

from collections.abc import Callable
from functools import partial
from math import lcm
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module


def apply_tp(model: nn.Module, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    """Divide a model over tp. Between the blocks' parts stand plain tensors: all tokens, or this rank's share."""
    between: Placement = Shard(1) if sequence_parallel else Replicate()
    styles: dict[str, ParallelStyle] = {}
    plan: dict[str, str] = model.tp_plan()  # type: ignore[operator]
    for path, style in plan.items():
        module = model.get_submodule(path)
        match style:
            case "colwise":
                styles[path] = ColwiseParallel()
            case "rowwise" if isinstance(module, nn.Embedding):
                styles[path] = RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
            case "rowwise":
                styles[path] = RowwiseParallel(output_layouts=between)
            case "norm":
                styles[path] = _GatheringNorm(between)
    parallelize_module(model, mesh, styles)


def divided_dim(placement: Placement) -> int | None:
    """Give the dimension that a placement divides; there are kinds of `Shard` that say they are none."""
    return getattr(placement, "dim", None)


class _GatheringNorm(ParallelStyle):
    """Norm this rank's tokens and give all of them, as a DTensor: one sum of gradients comes back for all columns."""

    def __init__(self, between: Placement) -> None:
        self.between = between

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, _replicate, self._enter, self._leave)  # type: ignore[arg-type]

    def _enter(self, _module: nn.Module, inputs: tuple[Tensor], mesh: DeviceMesh) -> tuple[DTensor]:
        return (DTensor.from_local(inputs[0], mesh, [self.between], run_check=False),)

    def _leave(self, _module: nn.Module, output: DTensor, _mesh: DeviceMesh) -> DTensor:
        return output.redistribute(placements=[Replicate()])


def _replicate(_name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for name, param in module.named_parameters(recurse=False):
        module.register_parameter(name, nn.Parameter(distribute_tensor(param, mesh, [Replicate()])))


class VocabularyShard:
    """This rank's rows of the head, and sums and maxima over all ranks', for the loss."""

    def __init__(self, mesh: DeviceMesh, n_vocab: int) -> None:
        self.n_vocab, self.group = n_vocab, mesh.get_group()
        self.first = n_vocab // mesh.size() * mesh.get_local_rank()

    def max_(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)

    def sum_(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=self.group)


def head_parts(h_BTD: Any, weight_VD: Any) -> tuple[Tensor, Tensor, VocabularyShard | None]:
    """Give a loss its tensors: all tokens, and this rank's rows of the vocabulary."""
    if not isinstance(weight_VD, DTensor):
        return h_BTD, weight_VD, None
    shard = VocabularyShard(weight_VD.device_mesh, weight_VD.shape[0])
    # Each rank has the gradient through its own rows of the vocabulary, and all of them are to be added.
    return h_BTD.to_local(grad_placements=[Partial()]), weight_VD.to_local(grad_placements=[Shard(0)]), shard


def apply_cp(model: nn.Module, mesh: DeviceMesh) -> None:
    """Let ranks that hold slices of rows attend to whole ones, each with a share of the heads (arXiv:2309.14509)."""
    for block in model.get_submodule("blocks").children():
        block.attend = partial(_whole_rows, block.attend, mesh.get_group())  # type: ignore[assignment]


def _whole_rows(
    attend: Callable[..., Tensor], group: dist.ProcessGroup, q: Tensor, k: Tensor, v: Tensor, **how: Any
) -> Tensor:
    size = group.size()
    n_kv_heads = k.shape[2]
    if n_kv_heads % size:  # each rank needs the key-value heads of its queries
        k, v = (x.repeat_interleave(lcm(n_kv_heads, size) // n_kv_heads, dim=2) for x in (k, v))
    q, k, v = (_heads_to_rows(x, group) for x in (q, k, v))
    return _rows_to_heads(attend(q, k, v, **how), group)


def _heads_to_rows(x_BTHK: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, T / cp, H, K) on each rank -> (B, T, H / cp, K)."""
    B, T, H, K = x_BTHK.shape
    size = group.size()
    sent = x_BTHK.view(B, T, size, H // size, K).permute(2, 0, 1, 3, 4).contiguous()
    return _exchange(sent, group).permute(1, 0, 2, 3, 4).reshape(B, size * T, H // size, K)


def _rows_to_heads(x_BTHK: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, T, H / cp, K) on each rank -> (B, T / cp, H, K)."""
    B, T, H, K = x_BTHK.shape
    size = group.size()
    sent = x_BTHK.view(B, size, T // size, H, K).permute(1, 0, 2, 3, 4).contiguous()
    return _exchange(sent, group).permute(1, 2, 0, 3, 4).reshape(B, T // size, size * H, K)


def _exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send part i to rank i, and give the parts that came, by rank."""
    from torch.distributed._functional_collectives import all_to_all_single_autograd

    # The public all_to_all_single has no gradient; this one is what DTensor and torch's own context parallelism use.
    received: Any = all_to_all_single_autograd(parts.flatten(), None, None, group)
    return received.view_as(parts)
