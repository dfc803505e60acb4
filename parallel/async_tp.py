"""Tensor parallelism whose messages overlap with its products: copy engines read other ranks' memory meanwhile.

Tokens are gathered while this rank's own are multiplied, and sums are exchanged while products go on that need none of
them. Linear layers of one input are one product where their weights lie side by side.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.transformer import Transformer
from parallel.config import ParallelError
from parallel.peers import SharedBuffer, SideStream, can_share
from parallel.tensor_parallel import RowwiseLinear


class Messages:
    """Gathers and reduces over the ranks of tp, on a stream of its own, through memory that they share."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.stream = SideStream(device)
        self.buffers: dict[tuple[int, torch.dtype], list[SharedBuffer]] = {}

    def rows(self, rank: int, whole: Tensor) -> slice:
        n = len(whole) // self.size
        return slice(rank * n, (rank + 1) * n)

    def buffer(self, n: int, like: Tensor) -> SharedBuffer:
        """Return one of two buffers in turn: a barrier of the other has come after all reads of this one."""
        its = self.buffers.setdefault((n, like.dtype), [])
        if len(its) < 2:
            its.append(SharedBuffer(n, like.dtype, like.device, self.group))
            return its[-1]
        its.reverse()
        return its[-1]

    def gather(self, part_tD: Tensor) -> tuple[Tensor, list[tuple[slice, Any]]]:
        """Start to gather tokens; returns all, and other ranks' rows with the event after which they are there."""
        whole = part_tD.new_empty(len(part_tD) * self.size, part_tD.shape[1])
        buffer, arriving = self.buffer(whole.numel(), whole), []
        # In order with the products: beside one, a barrier waits for a multiprocessor on every rank.
        buffer.mine[: part_tD.numel()].view_as(part_tD).copy_(part_tD)
        buffer.barrier()
        with self.stream.beside():
            for rank in buffer.others():
                rows = self.rows(rank, whole)
                whole[rows].copy_(buffer.of(rank, 0, part_tD.numel()).view_as(part_tD))
                arriving.append((rows, self.stream.event()))
            whole[self.rows(self.rank, whole)].copy_(part_tD)
        return whole, arriving

    def exchange(self, buffer: SharedBuffer, received_RtD: Tensor, ranks: Iterable[int]) -> None:
        """Start to read the partial sums that ranks have of this rank's tokens."""
        n = received_RtD[0].numel()
        with self.stream.beside():
            buffer.barrier()
            for rank in ranks:
                received_RtD[rank].copy_(buffer.of(rank, self.rank * n, n).view_as(received_RtD[rank]))


MESSAGES: dict[str, Messages] = {}  # by the name of the group: what custom operations can be given


def join(weights: Sequence[Tensor]) -> Tensor:
    """Return weights as one matrix: without a copy if they lie side by side."""
    first, end = weights[0], weights[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or weight.untyped_storage().data_ptr() != storage or not weight.is_contiguous():
            return torch.cat(list(weights))
        end += weight.nbytes
    return first.as_strided((sum(map(len, weights)), first.shape[1]), (first.shape[1], 1))


@torch.library.custom_op("pretraining::gather_products", mutates_args=())
def gather_products(x_tD: Tensor, weights: Sequence[Tensor], group: str) -> tuple[Tensor, Tensor]:
    """Return the tokens of all ranks, and their products with all the weights, (T, rows of the weights)."""
    messages, weight_MD = MESSAGES[group], join(weights)
    x_TD, arriving = messages.gather(x_tD)
    out_TM = x_TD.new_empty(len(x_TD), len(weight_MD))
    torch.mm(x_tD, weight_MD.T, out=out_TM[messages.rows(messages.rank, x_TD)])
    for rows, event in arriving:
        messages.stream.wait(event)
        torch.mm(x_TD[rows], weight_MD.T, out=out_TM[rows])
    messages.stream.join()
    return x_TD, out_TM


@gather_products.register_fake
def _(x_tD: Tensor, weights: Sequence[Tensor], group: str) -> tuple[Tensor, Tensor]:
    n = len(x_tD) * MESSAGES[group].size
    return x_tD.new_empty(n, x_tD.shape[1]), x_tD.new_empty(n, sum(len(weight) for weight in weights))


@torch.library.custom_op("pretraining::gather_products_backward", mutates_args=())
def gather_products_backward(
    grad_TM: Tensor, x_TD: Tensor, weights: Sequence[Tensor], group: str
) -> tuple[Tensor, Tensor]:
    """Return ranks' parts of the gradient of this rank's tokens, to be summed, and that of the joined weights."""
    messages, buffer = MESSAGES[group], MESSAGES[group].buffer(x_TD.numel(), x_TD)
    received_RtD = x_TD.new_empty(messages.size, len(x_TD) // messages.size, x_TD.shape[1])
    torch.mm(grad_TM, join(weights), out=buffer.mine.view_as(x_TD))
    messages.exchange(buffer, received_RtD, (*buffer.others(), messages.rank))
    grad_MD = grad_TM.T @ x_TD
    messages.stream.join()
    return received_RtD, grad_MD


@gather_products_backward.register_fake
def _(grad_TM: Tensor, x_TD: Tensor, weights: Sequence[Tensor], group: str) -> tuple[Tensor, Tensor]:
    (n, d), size = x_TD.shape, MESSAGES[group].size
    return x_TD.new_empty(size, n // size, d), x_TD.new_empty(grad_TM.shape[1], d)


@torch.library.custom_op("pretraining::scatter_product", mutates_args=())
def scatter_product(x_TK: Tensor, weight_DK: Tensor, group: str) -> Tensor:
    """Return ranks' parts of this rank's tokens of the product: each has some columns of the weight.

    They are still to be summed, which a compiler does together with what follows.
    """
    messages, n_tokens, d = MESSAGES[group], len(x_TK), len(weight_DK)
    buffer, mine = messages.buffer(n_tokens * d, x_TK), messages.rows(messages.rank, x_TK)
    received_RtD = x_TK.new_empty(messages.size, n_tokens // messages.size, d)
    partial_TD = buffer.mine.view(n_tokens, d)
    for rows in (slice(0, mine.start), slice(mine.stop, n_tokens)):  # of other ranks, which wait for them
        if rows.start < rows.stop:
            torch.mm(x_TK[rows], weight_DK.T, out=partial_TD[rows])
    messages.exchange(buffer, received_RtD, buffer.others())
    torch.mm(x_TK[mine], weight_DK.T, out=received_RtD[messages.rank])
    messages.stream.join()
    return received_RtD


@scatter_product.register_fake
def _(x_TK: Tensor, weight_DK: Tensor, group: str) -> Tensor:
    size = MESSAGES[group].size
    return x_TK.new_empty(size, len(x_TK) // size, len(weight_DK))


@torch.library.custom_op("pretraining::scatter_product_backward", mutates_args=())
def scatter_product_backward(grad_tD: Tensor, x_TK: Tensor, weight_DK: Tensor, group: str) -> tuple[Tensor, Tensor]:
    messages = MESSAGES[group]
    grad_TD, arriving = messages.gather(grad_tD)
    grad_TK = torch.empty_like(x_TK)
    torch.mm(grad_tD, weight_DK, out=grad_TK[messages.rows(messages.rank, x_TK)])
    for rows, event in arriving:
        messages.stream.wait(event)
        torch.mm(grad_TD[rows], weight_DK, out=grad_TK[rows])
    messages.stream.join()
    return grad_TK, grad_TD.T @ x_TK


@scatter_product_backward.register_fake
def _(grad_tD: Tensor, x_TK: Tensor, weight_DK: Tensor, group: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_TK), torch.empty_like(weight_DK)


def _save_gathered(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, weights, ctx.group = inputs
    ctx.save_for_backward(output[0], *weights)


def _gathered_gradients(ctx: Any, _: Tensor, grad_TM: Tensor) -> tuple[Tensor, list[Tensor], None]:
    x_TD, *weights = ctx.saved_tensors
    grads_RtD, grad_MD = gather_products_backward(grad_TM.contiguous(), x_TD, weights, ctx.group)
    return grads_RtD.sum(0), list(grad_MD.split([len(weight) for weight in weights])), None


def _save_scattered(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TK, weight_DK, ctx.group = inputs
    ctx.save_for_backward(x_TK, weight_DK)


def _scattered_gradients(ctx: Any, grad_RtD: Tensor) -> tuple[Tensor, Tensor, None]:
    # the gradient of a sum: the same for all its parts
    return *scatter_product_backward(grad_RtD[0].contiguous(), *ctx.saved_tensors, ctx.group), None


gather_products.register_autograd(_gathered_gradients, setup_context=_save_gathered)
scatter_product.register_autograd(_scattered_gradients, setup_context=_save_scattered)


class AsyncRowwiseLinear(RowwiseLinear):
    def forward(self, input: Tensor) -> Tensor:
        parts_RtD = scatter_product(input.flatten(0, 1).contiguous(), self.weight, self.tp.group_name)
        out_BtD = parts_RtD.sum(0).view(len(input), -1, len(self.weight))
        return out_BtD if self.bias is None else out_BtD + self.bias


def _linears(group: str, x_BtD: Tensor, *layers: Any) -> list[Tensor]:
    """Return the outputs of layers for all ranks' tokens, from this rank's."""
    weights = [layer.weight for layer in layers]
    _, out_TM = gather_products(x_BtD.flatten(0, 1), weights, group)
    outs = out_TM.view(len(x_BtD), -1, out_TM.shape[1]).split([len(weight) for weight in weights], dim=-1)
    return [out if layer.bias is None else out + layer.bias for out, layer in zip(outs, layers, strict=True)]


def joint_products(model: Transformer) -> dict[str, Any]:
    """Return the modules that multiply one input by several weights at once, by the path of the norm before them."""
    return {
        f"blocks.{layer}.{norm}": module
        for layer, block in model.blocks.items()
        for norm, module in (("attention_norm", block.attention), ("mlp_norm", block.mlp))
        if hasattr(module, "linears")
    }


def overlaps_tp(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return whether products of tp ranks can overlap with their messages; raises `ParallelError` if not."""
    if not can_share(group, device):
        raise ParallelError(
            "parallel.async_tp (true) needs tp ranks on GPUs of one node that read each other's memory; choose false"
        )
    return True


def overlap_tp(model: Transformer, joint: Iterable[Any], group: dist.ProcessGroup, device: torch.device) -> None:
    """Let the products of a model that is split over tp overlap with its messages."""
    MESSAGES[group.group_name] = Messages(group, device)
    for module in joint:
        module.linears = partial(_linears, group.group_name)
    for module in model.blocks.modules():
        if type(module) is RowwiseLinear:
            module.__class__ = AsyncRowwiseLinear
