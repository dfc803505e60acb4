"""Cross entropy of a linear head, computed in chunks that bound the memory of the logits."""

import importlib.util
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from data.batches import IGNORED


class Shard(Protocol):
    """This rank's rows of the head, and in-place reductions over the ranks."""

    first: int  # token id of the first row
    n_vocab: int  # of the whole head

    def max_(self, tensor: Tensor) -> object: ...
    def sum_(self, tensor: Tensor) -> object: ...


def linear_cross_entropy(
    h_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    loss_weights_N: Tensor,
    *,
    chunk_tokens: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of the weighted token losses, nll_N, and correct_N (whether the argmax is the label).

    The loss is fp32: `F.cross_entropy` with `label_smoothing`, plus `z_loss` times the square of the
    logits' log-sum-exp (arXiv:2204.02311, sec. 5). nll_N includes neither, and is 0 where the label is -100.
    Gradients are computed chunk by chunk in the forward pass, so at most `chunk_tokens` x V logits
    exist at once (arXiv:2410.10989, sec. 3.2). With a `shard`, the weight is that shard's rows, and the
    gradient of h is partial: sum it over the shards.
    """
    n_tokens, n_vocab = h_ND.shape[0], weight_VD.shape[0] if shard is None else shard.n_vocab
    first = 0 if shard is None else shard.first
    passes = _passes(h_ND)
    nll_N = torch.empty(n_tokens, dtype=torch.float32, device=h_ND.device)
    correct_N = torch.empty(n_tokens, dtype=torch.bool, device=h_ND.device)
    loss = torch.zeros((), dtype=torch.float32, device=h_ND.device)
    grad_h = torch.empty_like(h_ND, requires_grad=False) if torch.is_grad_enabled() else None
    grad_weight = None
    with torch.no_grad():
        for start in range(0, n_tokens, chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            h, labels = h_ND[chunk], labels_N[chunk]
            kept = labels != IGNORED
            token_weight = torch.where(kept, loss_weights_N[chunk], 0.0)
            logits = h @ weight_VD.T
            logits = logits if passes is not _TorchPasses else logits.float()
            here = passes.statistics(logits, labels - first)
            everywhere = here if shard is None else _reduced(here, shard)
            log_norm = everywhere.row_max + everywhere.sum_exp.log()
            nll = log_norm - everywhere.target
            nll_N[chunk] = nll * kept
            correct_N[chunk] = everywhere.argmax == labels
            token_loss = (1 - label_smoothing) * nll + label_smoothing * (log_norm - everywhere.total / n_vocab)
            loss += (token_weight * (token_loss + z_loss * log_norm.square())).sum()
            if grad_h is not None:
                factors = Factors(
                    softmax=token_weight * (1 + 2 * z_loss * log_norm),
                    target=token_weight * (1 - label_smoothing),
                    uniform=token_weight * (label_smoothing / n_vocab) if label_smoothing else None,
                )
                grad = passes.gradient(logits, labels - first, here.row_max, log_norm, factors).to(h.dtype)
                torch.mm(grad, weight_VD, out=grad_h[chunk])
                grad_weight = _add_product(grad_weight, grad, h, alone=chunk_tokens >= n_tokens)
    if grad_h is not None:
        loss = _WithGradients.apply(h_ND, weight_VD, loss, grad_h, grad_weight)
    return loss, nll_N, correct_N  # type: ignore[return-value]


class _WithGradients(torch.autograd.Function):
    """A loss with precomputed gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, h: Tensor, weight: Tensor, loss: Tensor, *gradients: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)  # type: ignore[attr-defined]
        ctx.weight_dtype = weight.dtype  # type: ignore[attr-defined]
        return loss.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_h, grad_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        scaled = _passes(grad_h).scaled
        grad_weight = scaled(grad_weight, grad_loss, ctx.weight_dtype)  # type: ignore[attr-defined]
        return scaled(grad_h, grad_loss, grad_h.dtype), grad_weight, None, None, None


def _add_product(total_VD: Tensor | None, grad_NV: Tensor, h_ND: Tensor, *, alone: bool) -> Tensor:
    """Add a chunk's gradient of the weight, in fp32 unless there is only one chunk."""
    if alone:
        return grad_NV.T @ h_ND
    if not h_ND.is_cuda or h_ND.dtype == torch.float32:
        grad_NV, h_ND = grad_NV.float(), h_ND.float()
        return grad_NV.T @ h_ND if total_VD is None else total_VD.addmm_(grad_NV.T, h_ND)
    if total_VD is None:
        return torch.mm(grad_NV.T, h_ND, out_dtype=torch.float32)
    # Accumulates in the epilogue of the product, without another pass over V x D.
    return torch.ops.aten.addmm.dtype_out(total_VD, grad_NV.T, h_ND, torch.float32, out=total_VD)


class Statistics(NamedTuple):
    """Statistics of a chunk of logits, per row; fp32, argmax int64."""

    row_max: Tensor
    argmax: Tensor
    sum_exp: Tensor  # of exp(logit - row_max)
    target: Tensor  # logit of the label, 0 where another shard has it
    total: Tensor  # sum of the logits


class Factors(NamedTuple):
    """Per row: d loss / d logit = softmax * softmax(logit) - target * onehot - uniform."""

    softmax: Tensor
    target: Tensor
    uniform: Tensor | None


def _reduced(here: Statistics, shard: Shard) -> Statistics:
    """Combine the statistics of all shards of the vocabulary."""
    row_max = here.row_max.clone()
    shard.max_(row_max)
    sums = torch.stack([here.sum_exp * (here.row_max - row_max).exp(), here.target, here.total])
    shard.sum_(sums)
    # The first of equal logits wins, as within a shard; fp32 is exact up to 2**24.
    guess = torch.where(here.row_max == row_max, -(here.argmax + shard.first).float(), float("-inf"))
    shard.max_(guess)
    return Statistics(row_max, (-guess).long(), *sums)


class _TorchPasses:
    """The functions of `model.loss_kernel` in PyTorch, for any device."""

    @staticmethod
    def statistics(logits_NV: Tensor, labels_N: Tensor) -> Statistics:
        """Also overwrite the logits with exp(logit - row_max)."""
        inside = (labels_N >= 0) & (labels_N < logits_NV.shape[1])
        target = logits_NV.gather(1, torch.where(inside, labels_N, 0).long()[:, None])[:, 0]
        row_max, argmax = logits_NV.max(dim=-1)
        total = logits_NV.sum(dim=-1)
        sum_exp = logits_NV.sub_(row_max[:, None]).exp_().sum(dim=-1)
        return Statistics(row_max, argmax, sum_exp, torch.where(inside, target, 0.0), total)

    @staticmethod
    def gradient(exp_NV: Tensor, labels_N: Tensor, row_max_N: Tensor, log_norm_N: Tensor, factors: Factors) -> Tensor:
        grad = exp_NV.mul_(((row_max_N - log_norm_N).exp() * factors.softmax)[:, None])
        if factors.uniform is not None:
            grad.sub_(factors.uniform[:, None])
        inside = (labels_N >= 0) & (labels_N < grad.shape[1])
        index, value = torch.where(inside, labels_N, 0).long(), torch.where(inside, -factors.target, 0.0)
        return grad.scatter_add_(1, index[:, None], value[:, None])

    @staticmethod
    def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype) * factor.to(dtype)


def _passes(h_ND: Tensor) -> type[_TorchPasses] | ModuleType:
    if h_ND.is_cuda and importlib.util.find_spec("triton") is not None:
        from model import loss_kernel

        return loss_kernel
    return _TorchPasses
