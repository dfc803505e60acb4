"""Cross entropy of a linear head, in chunks: the logits of a whole batch never exist."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

IGNORED = -100


def linear_cross_entropy(
    h_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    loss_weights_N: Tensor,
    *,
    chunk_tokens: int,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give `sum(loss_weights * loss of each token)`, and of each token its nll and whether it was guessed.

    The loss is fp32, as `F.cross_entropy`'s with `label_smoothing`; nll_N is not smoothed, and 0 where
    the label is -100. Gradients are computed chunk by chunk in the forward pass, so at most
    `chunk_tokens` x V logits exist (the idea of arXiv:2410.10989, sec. 3.2).
    """
    return _LinearCrossEntropy.apply(
        h_ND, weight_VD, labels_N, loss_weights_N, chunk_tokens, label_smoothing, torch.is_grad_enabled()
    )  # type: ignore[return-value]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        h_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        loss_weights_N: Tensor,
        chunk_tokens: int,
        smoothing: float,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n_tokens, n_vocab = h_ND.shape[0], weight_VD.shape[0]
        nll_N = torch.empty(n_tokens, dtype=torch.float32, device=h_ND.device)
        correct_N = torch.empty(n_tokens, dtype=torch.bool, device=h_ND.device)
        loss = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        grad_h = torch.empty_like(h_ND) if with_gradients else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if with_gradients else None
        for start in range(0, n_tokens, chunk_tokens):
            part = slice(start, start + chunk_tokens)
            h, labels = h_ND[part], labels_N[part]
            kept = labels != IGNORED
            target, token_weight = labels.clamp(min=0)[:, None], loss_weights_N[part] * kept
            logits = (h @ weight_VD.T).float()
            log_norm = logits.logsumexp(dim=-1)
            nll = log_norm - logits.gather(1, target)[:, 0]
            nll_N[part] = nll * kept
            correct_N[part] = (logits.argmax(dim=-1) == labels) & kept
            smooth_nll = log_norm - logits.mean(dim=-1) if smoothing else nll
            loss += torch.where(kept, token_weight * ((1 - smoothing) * nll + smoothing * smooth_nll), 0.0).sum()
            if grad_h is None or grad_weight is None:
                continue
            # d loss / d logits = weight * (softmax - (1 - smoothing) * onehot - smoothing / V), in place
            grad = logits.sub_(log_norm[:, None]).exp_()
            if smoothing:
                grad.sub_(smoothing / n_vocab)
            grad.scatter_add_(1, target, torch.full_like(target, -(1 - smoothing), dtype=grad.dtype))
            grad = grad.mul_(token_weight[:, None]).to(h.dtype)
            torch.mm(grad, weight_VD, out=grad_h[part])
            if h.is_cuda and h.dtype != torch.float32:
                grad_weight += torch.mm(grad.T, h, out_dtype=torch.float32)
            else:
                grad_weight.addmm_(grad.T.float(), h.float())
        if grad_h is not None and grad_weight is not None:
            ctx.save_for_backward(grad_h, grad_weight)  # type: ignore[attr-defined]
        ctx.weight_dtype = weight_VD.dtype  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(nll_N, correct_N)  # type: ignore[attr-defined]
        return loss, nll_N, correct_N

    @staticmethod
    def backward(ctx: FunctionCtx, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_h, grad_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)  # type: ignore[attr-defined]
        return grad_h * grad_loss.to(grad_h.dtype), grad_weight, None, None, None, None, None
