"""Tensor parallelism by the model's own plan, and context parallelism, which splits the tokens of a sequence.

Weights are plain tensors that hold this rank's part, and collectives are operations between them, so that a compiler
sees both. Between layers each rank has its share of the tokens (Korthikanti et al. 2022, arXiv:2205.05198), or all of
them without sequence parallelism.
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
    """The ranks that split each matrix, as the layers need them."""

    group_name: str
    size: int
    rank: int
    sequence_parallel: bool


def _all_gather(x_BtD: Tensor, tp: TensorParallel) -> Tensor:
    """Return all ranks' tokens, which are slices of the flattened batch."""
    rows, length = x_BtD.shape[:2]
    flat = x_BtD.flatten(0, 1).contiguous()
    whole = collectives.wait_tensor(collectives.all_gather_into_tensor(flat, tp.size, tp.group_name))
    return whole.view(rows, length * tp.size, -1)


def _reduce_scatter(x_BTD: Tensor, tp: TensorParallel) -> Tensor:
    rows, length = x_BTD.shape[:2]
    flat = x_BTD.flatten(0, 1).contiguous()
    part = collectives.wait_tensor(collectives.reduce_scatter_tensor(flat, "sum", tp.size, tp.group_name))
    return part.view(rows, length // tp.size, -1)


def _all_reduce(x: Tensor, tp: TensorParallel) -> Tensor:
    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", tp.group_name))


class _Enter(torch.autograd.Function):
    """Stands before matrices whose outputs are split: they need all tokens, and each has a part of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return _all_gather(x, tp) if tp.sequence_parallel else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return (_reduce_scatter if ctx.tp.sequence_parallel else _all_reduce)(grad, ctx.tp), None


class _Leave(torch.autograd.Function):
    """Stands after matrices whose inputs are split: their outputs are sums over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return (_reduce_scatter if tp.sequence_parallel else _all_reduce)(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _all_gather(grad, ctx.tp) if ctx.tp.sequence_parallel else grad, None


class RowwiseLinear(nn.Linear):
    """A linear layer that has some of the columns of its weight; the bias is added to the sum."""

    tp: TensorParallel
    product: Callable[[Tensor, Tensor], Tensor] = staticmethod(F.linear)

    def forward(self, input: Tensor) -> Tensor:
        out: Any = _Leave.apply(self.product(input, self.weight), self.tp)
        return out if self.bias is None else out + self.bias


class SplitEmbedding(nn.Embedding):
    """An embedding that has some of the rows of its table."""

    tp: TensorParallel

    def forward(self, input: Tensor) -> Tensor:
        rows_BT = input - self.tp.rank * len(self.weight)
        inside_BT = (rows_BT >= 0) & (rows_BT < len(self.weight))
        out_BTD = F.embedding(torch.where(inside_BT, rows_BT, 0), self.weight)
        out: Any = _Leave.apply(out_BTD * inside_BT[..., None], self.tp)
        return out


@cache
def _gathering(norm: type[nn.Module]) -> type[nn.Module]:
    """Return a norm of this rank's tokens that returns all tokens."""

    class Gathering(norm):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Any:
            return _Enter.apply(super().forward(x), self.tp)

    return Gathering


def apply_tp(
    model: Transformer, mesh: DeviceMesh, sequence_parallel: bool, *, local_norms: Collection[str] = ()
) -> tuple[dict[str, int], set[str]]:
    """Split a model on the meta device over tp as its `tp_plan` says.

    colwise: outputs are split; rowwise: inputs are split, so that outputs are sums over tp; norm: the weight is
    replicated, and all tokens are gathered after it, unless it is one of `local_norms`. Returns the dimension that
    each split parameter is split in, and the parameters of which each rank computes a part of the gradient, to be
    summed over tp.
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
            split_class: type[nn.Module] = SplitEmbedding if is_embedding else RowwiseLinear
            module.__class__ = split_class
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
    """This rank's rows of the head, and reductions over all ranks' rows, for the loss."""

    def __init__(self, mesh: DeviceMesh, n_vocab: int) -> None:
        self.n_vocab, self.group = n_vocab, mesh.get_group()
        self.first = n_vocab // mesh.size() * mesh.get_local_rank()

    def max_(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)

    def sum_(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=self.group)


def apply_cp(model: Transformer, mesh: DeviceMesh) -> None:
    """Let each rank attend to whole sequences with a part of the heads (Ulysses, arXiv:2309.14509)."""
    for block in model.blocks.values():
        block.attend = partial(_ulysses, block.attend, mesh.get_group())  # type: ignore[assignment]


def _ulysses(
    attend: Callable[..., Tensor], group: dist.ProcessGroup, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any
) -> Tensor:
    size, n_kv_heads = group.size(), k.shape[2]
    if n_kv_heads % size:  # each rank needs the key-value heads of its queries
        k, v = (x.repeat_interleave(lcm(n_kv_heads, size) // n_kv_heads, dim=2) for x in (k, v))
    # one message: of each rank's heads, the queries, keys and values
    parts: Any = _SwapHeadsForTokens.apply(group, q, k, v)
    out: Any = _SwapTokensForHeads.apply(group, attend(*parts, **kwargs))
    return out


def _heads_to_ranks(group: dist.ProcessGroup, *tensors_BthK: Tensor) -> list[Tensor]:
    """Send rank i the i-th share of each tensor's heads, and return all ranks' tokens of this rank's heads."""
    size = group.size()
    chunks = [x.unflatten(2, (size, -1)).movedim(2, 0) for x in tensors_BthK]
    received = exchange(torch.cat(chunks, dim=3), group)
    whole = received.transpose(0, 1).flatten(1, 2)  # of one row, a view
    return list(whole.split([chunk.shape[3] for chunk in chunks], dim=2))


def _tokens_to_ranks(group: dist.ProcessGroup, *tensors_BThK: Tensor) -> list[Tensor]:
    """Send rank i the i-th share of the tokens, and return all ranks' heads of this rank's tokens."""
    size = group.size()
    received = exchange(torch.cat(tensors_BThK, dim=2).unflatten(1, (size, -1)).transpose(0, 1), group)
    parts = received.split([x.shape[2] for x in tensors_BThK], dim=3)
    return [part.movedim(0, 2).flatten(2, 3) for part in parts]


def exchange(chunks: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send chunk i of the first dimension to rank i, and return the chunks received, by rank."""
    sent = chunks.contiguous()
    received = torch.empty_like(sent)
    # as bytes: gloo does not exchange every dtype
    dist.all_to_all_single(received.view(torch.uint8), sent.view(torch.uint8), group=group)
    return received


class _SwapHeadsForTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(_heads_to_ranks(group, *tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *_tokens_to_ranks(ctx.group, *grads)


class _SwapTokensForHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, x: Tensor) -> Tensor:
        ctx.group = group
        return _tokens_to_ranks(group, x)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, _heads_to_ranks(ctx.group, grad)[0]
