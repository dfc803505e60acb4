"""Tensor parallelism by a model's `tp_plan`, and context parallelism.

Weights are plain tensors with this rank's part and collectives are functional, so that torch.compile traces both. Norms
and residuals are split over tokens (sequence parallelism, Korthikanti et al. 2022, arXiv:2205.05198) or replicated.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache, partial
from math import lcm
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from model.transformer import Transformer

collectives: Any = torch.ops._c10d_functional


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """The tensor-parallel group, as layers use it."""

    group_name: str
    size: int
    rank: int
    sequence_parallel: bool


def _gather(x_BtD: Tensor, tp: TensorParallel) -> Tensor:
    """Gather the tokens of all ranks, which are slices of the flattened batch, unless each has all of them."""
    if not tp.sequence_parallel:
        return x_BtD.view_as(x_BtD)
    rows, length = x_BtD.shape[:2]
    flat = x_BtD.flatten(0, 1).contiguous()
    full = collectives.wait_tensor(collectives.all_gather_into_tensor(flat, tp.size, tp.group_name))
    return full.view(rows, length * tp.size, -1)


def _sum(x_BTD: Tensor, tp: TensorParallel) -> Tensor:
    """Sum over ranks; return this rank's tokens, or all."""
    if not tp.sequence_parallel:
        return collectives.wait_tensor(collectives.all_reduce(x_BTD.contiguous(), "sum", tp.group_name))
    rows, length = x_BTD.shape[:2]
    flat = x_BTD.flatten(0, 1).contiguous()
    part = collectives.wait_tensor(collectives.reduce_scatter_tensor(flat, "sum", tp.size, tp.group_name))
    return part.view(rows, length // tp.size, -1)


class _Between(torch.autograd.Function):
    """Gather tokens before colwise layers, or sum partial outputs after rowwise ones; gradients take the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel, gathers: bool) -> Tensor:
        ctx.tp, ctx.gathers = tp, gathers
        return _gather(x, tp) if gathers else _sum(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _sum(grad, ctx.tp) if ctx.gathers else _gather(grad, ctx.tp), None, None


class RowwiseLinear(nn.Linear):
    """A linear layer with a slice of the weight's columns; the bias is added after the reduction."""

    tp: TensorParallel
    product: Callable[[Tensor, Tensor], Tensor] = staticmethod(F.linear)

    def forward(self, input: Tensor) -> Tensor:
        out: Any = _Between.apply(self.product(input, self.weight), self.tp, False)
        return out if self.bias is None else out + self.bias


class SplitEmbedding(nn.Embedding):
    """An embedding with a slice of the table's rows."""

    tp: TensorParallel

    def forward(self, input: Tensor) -> Tensor:
        rows_BT = input - self.tp.rank * len(self.weight)
        in_slice_BT = (rows_BT >= 0) & (rows_BT < len(self.weight))
        out_BTD = F.embedding(torch.where(in_slice_BT, rows_BT, 0), self.weight)
        out: Any = _Between.apply(out_BTD * in_slice_BT[..., None], self.tp, False)
        return out


@cache
def _gathering(norm: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of a norm that gathers all tokens after it."""

    class Gathering(norm):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Any:
            return _Between.apply(super().forward(x), self.tp, True)

    return Gathering


def apply_tp(
    model: Transformer, mesh: DeviceMesh, sequence_parallel: bool, *, local_norms: Collection[str] = ()
) -> tuple[dict[str, int], set[str]]:
    """Split a model on the meta device over tp by its `tp_plan`.

    colwise: outputs are split; rowwise: inputs are split, so outputs are summed over tp; norm: the weight is
    replicated, and all tokens are gathered after it, except for `local_norms`. Return the split dimension of each
    split parameter, and the names of the parameters whose gradients are to be summed over tp.
    """
    group: Any = mesh.get_group()
    tp = TensorParallel(group.group_name, mesh.size(), mesh.get_local_rank(), sequence_parallel)
    split: dict[str, int] = {}
    partial_grads: set[str] = set()
    for path, style in model.tp_plan().items():
        module: Any = model.get_submodule(path)
        is_embedding = bool(isinstance(module, nn.Embedding))
        if style == "norm" and path not in local_norms:
            module.__class__ = _gathering(type(module))
        elif style == "rowwise":
            module.__class__ = SplitEmbedding if is_embedding else RowwiseLinear
        module.tp = tp
        for name, param in module.named_parameters(recurse=False):
            if style == "norm" or (style == "rowwise" and param.ndim == 1):
                partial_grads |= {f"{path}.{name}"} if sequence_parallel else set()
                continue
            dim = 1 if style == "rowwise" and not is_embedding else 0
            split[f"{path}.{name}"] = dim
            setattr(module, name, nn.Parameter(param.chunk(mesh.size(), dim)[0].contiguous()))
    return split, partial_grads


class VocabularyShard:
    """This rank's rows of the head, and reductions over the vocabulary, for the loss."""

    def __init__(self, mesh: DeviceMesh, n_vocab: int) -> None:
        self.n_vocab, self.group = n_vocab, mesh.get_group()
        self.first = n_vocab // mesh.size() * mesh.get_local_rank()

    def max_(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)

    def sum_(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=self.group)


def apply_cp(model: Transformer, mesh: DeviceMesh) -> None:
    """Make each rank attend to full sequences with a part of the heads (Ulysses, arXiv:2309.14509)."""
    for block in model.blocks.values():
        block.attend = partial(_ulysses, block.attend, mesh.get_group())  # type: ignore[assignment]


def _ulysses(
    attend: Callable[..., Tensor], group: dist.ProcessGroup, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any
) -> Tensor:
    size, n_kv_heads = group.size(), k.shape[2]
    if n_kv_heads % size:  # each rank needs the key-value heads of its queries
        k, v = (x.repeat_interleave(lcm(n_kv_heads, size) // n_kv_heads, dim=2) for x in (k, v))
    # queries, keys and values in one all-to-all
    parts: Any = _Swap.apply(group, _heads_to_ranks, _tokens_to_ranks, q, k, v)
    (out,) = _Swap.apply(group, _tokens_to_ranks, _heads_to_ranks, attend(*parts, **kwargs))  # type: ignore[misc]
    return out


def _heads_to_ranks(group: dist.ProcessGroup, *tensors_BthK: Tensor) -> list[Tensor]:
    """Send slice i of each tensor's heads to rank i; return all tokens of this rank's heads."""
    size = group.size()
    chunks = [x.unflatten(2, (size, -1)).movedim(2, 0) for x in tensors_BthK]
    received = exchange(torch.cat(chunks, dim=3), group)
    full = received.transpose(0, 1).flatten(1, 2)  # a view if there is one row
    return list(full.split([chunk.shape[3] for chunk in chunks], dim=2))


def _tokens_to_ranks(group: dist.ProcessGroup, *tensors_BThK: Tensor) -> list[Tensor]:
    """Send slice i of the tokens to rank i; return all heads of this rank's tokens."""
    size = group.size()
    received = exchange(torch.cat(tensors_BThK, dim=2).unflatten(1, (size, -1)).transpose(0, 1), group)
    parts = received.split([x.shape[2] for x in tensors_BThK], dim=3)
    return [part.movedim(0, 2).flatten(2, 3) for part in parts]


def exchange(chunks: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send chunk i of the first dimension to rank i; return the received chunks by rank."""
    sent = chunks.contiguous()
    received = torch.empty_like(sent)
    # as bytes, because gloo does not support every dtype
    dist.all_to_all_single(received.view(torch.uint8), sent.view(torch.uint8), group=group)
    return received


class _Swap(torch.autograd.Function):
    """One of the two exchanges; `back` is the other, which its gradients take."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, swap: Any, back: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.back = group, back
        return tuple(swap(group, *tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, None, *ctx.back(ctx.group, *grads)
