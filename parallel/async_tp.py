"""Asynchronous tensor parallelism: copy engines read peers' memory while matrix products run.

An all-gather overlaps with the products of this rank's tokens, and a reduce-scatter with those of other tokens. Linear
layers with the same input are one product if their weights are adjacent in memory.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from model.transformer import Transformer
from parallel.config import ParallelError
from parallel.peers import SharedBuffer, SideStream, can_share
from parallel.tensor_parallel import RowwiseLinear


class PeerCollectives:
    """All-gather and all-to-all over tp ranks, on a separate stream, through shared memory."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.stream = SideStream(device)
        self.buffers: dict[tuple[int, torch.dtype], list[SharedBuffer]] = {}

    def rows(self, rank: int, full: Tensor) -> slice:
        n = len(full) // self.size
        return slice(rank * n, (rank + 1) * n)

    def buffer(self, n: int, like: Tensor) -> SharedBuffer:
        """Return one of two buffers in turn: the barrier of the other follows all reads of this one.

        It has at least `n` elements; buffers are kept, because graphs record their addresses.
        """
        n = min((size for size, dtype in self.buffers if dtype == like.dtype and size >= n), default=n)
        pair = self.buffers.setdefault((n, like.dtype), [])
        if len(pair) < 2:
            pair.append(SharedBuffer(n, like.dtype, like.device, self.group))
            return pair[-1]
        pair.reverse()
        return pair[-1]

    def gather_matmul(self, part_tD: Tensor, matrix_DM: Tensor) -> tuple[Tensor, Tensor]:
        """All-gather tokens; return all of them and their products with a matrix, this rank's first."""
        full = part_tD.new_empty(len(part_tD) * self.size, part_tD.shape[1])
        out_TM = full.new_empty(len(full), matrix_DM.shape[1])
        buffer, pending = self.buffer(full.numel(), full), []
        # On the current stream: next to a product, a barrier would wait for a free SM on every rank.
        buffer.local[: part_tD.numel()].view_as(part_tD).copy_(part_tD)
        buffer.barrier()
        with self.stream.after_current():
            for rank in buffer.others():
                rows = self.rows(rank, full)
                full[rows].copy_(buffer.of(rank, 0, part_tD.numel()).view_as(part_tD))
                pending.append((rows, self.stream.event()))
            full[self.rows(self.rank, full)].copy_(part_tD)
        torch.mm(part_tD, matrix_DM, out=out_TM[self.rows(self.rank, full)])
        for rows, event in pending:
            self.stream.wait(event)
            torch.mm(full[rows], matrix_DM, out=out_TM[rows])
        self.stream.join()
        return full, out_TM

    def start_exchange(self, buffer: SharedBuffer, received_RtD: Tensor, ranks: Iterable[int]) -> None:
        """Start to read the partial sums of this rank's tokens from `ranks`."""
        n = received_RtD[0].numel()
        with self.stream.after_current():
            buffer.barrier()
            for rank in ranks:
                received_RtD[rank].copy_(buffer.of(rank, self.rank * n, n).view_as(received_RtD[rank]))


# By group name, because custom ops take strings; the model keeps them.
COLLECTIVES: WeakValueDictionary[str, PeerCollectives] = WeakValueDictionary()


def join(weights: Sequence[Tensor]) -> Tensor:
    """Concatenate weights; without a copy if they are adjacent in memory."""
    first, end = weights[0], weights[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or weight.untyped_storage().data_ptr() != storage or not weight.is_contiguous():
            return torch.cat(list(weights))
        end += weight.nbytes
    return first.as_strided((sum(map(len, weights)), first.shape[1]), (first.shape[1], 1))


@torch.library.custom_op("pretraining::gather_matmul", mutates_args=())
def gather_matmul(x_tD: Tensor, weights: Sequence[Tensor], group: str) -> tuple[Tensor, Tensor]:
    """All-gather tokens; return them and their products with the concatenated weights, (T, M)."""
    return COLLECTIVES[group].gather_matmul(x_tD, join(weights).T)


@gather_matmul.register_fake
def _(x_tD: Tensor, weights: Sequence[Tensor], group: str) -> tuple[Tensor, Tensor]:
    n = len(x_tD) * COLLECTIVES[group].size
    return x_tD.new_empty(n, x_tD.shape[1]), x_tD.new_empty(n, sum(len(weight) for weight in weights))


@torch.library.custom_op("pretraining::gather_matmul_backward", mutates_args=())
def gather_matmul_backward(
    grad_TM: Tensor, x_TD: Tensor, weights: Sequence[Tensor], group: str
) -> tuple[Tensor, Tensor]:
    """Return each rank's part of the gradient of this rank's tokens, not summed, and the gradient of the weights."""
    comm, buffer = COLLECTIVES[group], COLLECTIVES[group].buffer(x_TD.numel(), x_TD)
    received_RtD = x_TD.new_empty(comm.size, len(x_TD) // comm.size, x_TD.shape[1])
    torch.mm(grad_TM, join(weights), out=buffer.local[: x_TD.numel()].view_as(x_TD))
    comm.start_exchange(buffer, received_RtD, (*buffer.others(), comm.rank))
    grad_MD = grad_TM.T @ x_TD
    comm.stream.join()
    return received_RtD, grad_MD


@gather_matmul_backward.register_fake
def _(grad_TM: Tensor, x_TD: Tensor, weights: Sequence[Tensor], group: str) -> tuple[Tensor, Tensor]:
    (n, d), size = x_TD.shape, COLLECTIVES[group].size
    return x_TD.new_empty(size, n // size, d), x_TD.new_empty(grad_TM.shape[1], d)


@torch.library.custom_op("pretraining::matmul_scatter", mutates_args=())
def matmul_scatter(x_TK: Tensor, weight_DK: Tensor, group: str) -> Tensor:
    """Return each rank's part of a rowwise product for this rank's tokens.

    The parts are not summed, so that the compiler can fuse the sum with the next operation.
    """
    comm, n_tokens, d = COLLECTIVES[group], len(x_TK), len(weight_DK)
    buffer, local = comm.buffer(n_tokens * d, x_TK), comm.rows(comm.rank, x_TK)
    received_RtD = x_TK.new_empty(comm.size, n_tokens // comm.size, d)
    partial_TD = buffer.local[: n_tokens * d].view(n_tokens, d)
    for rows in (slice(0, local.start), slice(local.stop, n_tokens)):  # other ranks' tokens first
        if rows.start < rows.stop:
            torch.mm(x_TK[rows], weight_DK.T, out=partial_TD[rows])
    comm.start_exchange(buffer, received_RtD, buffer.others())
    torch.mm(x_TK[local], weight_DK.T, out=received_RtD[comm.rank])
    comm.stream.join()
    return received_RtD


@matmul_scatter.register_fake
def _(x_TK: Tensor, weight_DK: Tensor, group: str) -> Tensor:
    size = COLLECTIVES[group].size
    return x_TK.new_empty(size, len(x_TK) // size, len(weight_DK))


@torch.library.custom_op("pretraining::matmul_scatter_backward", mutates_args=())
def matmul_scatter_backward(grad_tD: Tensor, x_TK: Tensor, weight_DK: Tensor, group: str) -> tuple[Tensor, Tensor]:
    grad_TD, grad_TK = COLLECTIVES[group].gather_matmul(grad_tD, weight_DK)
    return grad_TK, grad_TD.T @ x_TK


@matmul_scatter_backward.register_fake
def _(grad_tD: Tensor, x_TK: Tensor, weight_DK: Tensor, group: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_TK), torch.empty_like(weight_DK)


def _save_gathered(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, weights, ctx.group = inputs
    ctx.save_for_backward(output[0], *weights)


def _gathered_gradients(ctx: Any, _: Tensor, grad_TM: Tensor) -> tuple[Tensor, list[Tensor], None]:
    x_TD, *weights = ctx.saved_tensors
    grads_RtD, grad_MD = gather_matmul_backward(grad_TM.contiguous(), x_TD, weights, ctx.group)
    return grads_RtD.sum(0), list(grad_MD.split([len(weight) for weight in weights])), None


def _save_scattered(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TK, weight_DK, ctx.group = inputs
    ctx.save_for_backward(x_TK, weight_DK)


def _scattered_gradients(ctx: Any, grad_RtD: Tensor) -> tuple[Tensor, Tensor, None]:
    # the gradient of a sum is the same for all of its terms
    return *matmul_scatter_backward(grad_RtD[0].contiguous(), *ctx.saved_tensors, ctx.group), None


gather_matmul.register_autograd(_gathered_gradients, setup_context=_save_gathered)
matmul_scatter.register_autograd(_scattered_gradients, setup_context=_save_scattered)


class AsyncRowwiseLinear(RowwiseLinear):
    def forward(self, input: Tensor) -> Tensor:
        parts_RtD = matmul_scatter(input.flatten(0, 1).contiguous(), self.weight, self.tp.group_name)
        out_BtD = parts_RtD.sum(0).view(len(input), -1, len(self.weight))
        return out_BtD if self.bias is None else out_BtD + self.bias


def _gathered_linears(group: str, x_BtD: Tensor, *layers: Any) -> list[Tensor]:
    """Return the outputs of layers for all ranks' tokens."""
    weights = [layer.weight for layer in layers]
    _, out_TM = gather_matmul(x_BtD.flatten(0, 1), weights, group)
    outs = out_TM.view(len(x_BtD), -1, out_TM.shape[1]).split([len(weight) for weight in weights], dim=-1)
    return [out if layer.bias is None else out + layer.bias for out, layer in zip(outs, layers, strict=True)]


def fused_linears(model: Transformer) -> dict[str, Any]:
    """Return the modules with fused linear layers, by the path of the preceding norm."""
    return {
        f"blocks.{layer}.{norm}": module
        for layer, block in model.blocks.items()
        for norm, module in (("attention_norm", block.attention), ("mlp_norm", block.mlp))
        if "linears" in vars(type(module))
    }


def overlap_tp(model: Transformer, fused: Iterable[Any], group: dist.ProcessGroup, device: torch.device) -> None:
    """Overlap the products and collectives of a tensor-parallel model."""
    if not can_share(group, device):
        raise ParallelError(
            "parallel.async_tp (true) needs tp ranks on GPUs of one node with peer access; set it to false"
        )
    COLLECTIVES[group.group_name] = collectives = PeerCollectives(group, device)
    for module in fused:
        module.collectives = collectives
        module.linears = partial(_gathered_linears, group.group_name)
    for module in model.blocks.modules():
        if type(module) is RowwiseLinear:
            module.__class__ = AsyncRowwiseLinear
