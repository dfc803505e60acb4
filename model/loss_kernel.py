"""Triton kernels of the loss: one pass over the logits for the statistics, one for the gradient in place."""

from typing import Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

from model.loss import Factors, Statistics

BLOCK = 4096


@triton.jit
def _statistics_kernel(logits, labels, row_max, argmax, sum_exp, target, total, n_vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * n_vocab
    label = tl.load(labels + row)
    column = tl.arange(0, BLOCK)
    # Each lane keeps its maximum, sum and argmax; they are combined once, after the last column.
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    exp_sum = tl.zeros((BLOCK,), tl.float32)
    plain_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_vocab, BLOCK):
        inside = start + column < n_vocab
        x = tl.load(logits + start + column, mask=inside, other=float("-inf")).to(tl.float32)
        above = tl.maximum(largest, x)
        # A lane without a column so far holds -inf, and -inf - -inf is NaN.
        exp_sum = tl.where(inside, exp_sum * tl.exp(largest - above) + tl.exp(x - above), exp_sum)
        place = tl.where(x > largest, start + column, place)
        plain_sum += tl.where(inside, x, 0.0)
        largest = above
    best = tl.max(largest, 0)
    tl.store(row_max + row, best)
    tl.store(argmax + row, tl.min(tl.where(largest == best, place, n_vocab), 0).to(tl.int64))
    seen = largest > float("-inf")
    tl.store(sum_exp + row, tl.sum(tl.where(seen, exp_sum * tl.exp(largest - best), 0.0), 0))
    tl.store(total + row, tl.sum(plain_sum, 0))
    mine = (label >= 0) & (label < n_vocab)
    tl.store(target + row, tl.load(logits + label, mask=mine, other=0.0).to(tl.float32))


@triton.jit
def _gradient_kernel(
    logits, labels, log_norm, softmax, target, uniform, n_vocab, UNIFORM: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * n_vocab
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n_vocab
    x = tl.load(logits + column, mask=inside).to(tl.float32)
    grad = tl.exp(x - tl.load(log_norm + row)) * tl.load(softmax + row)
    if UNIFORM:
        grad -= tl.load(uniform + row)
    grad = tl.where(column == tl.load(labels + row), grad - tl.load(target + row), grad)
    tl.store(logits + column, grad, mask=inside)


@triton.jit
def _scaled_kernel(x, factor, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(out + at, tl.load(x + at, mask=inside).to(tl.float32) * tl.load(factor), mask=inside)


def statistics(logits_NV: Tensor, labels_N: Tensor) -> Statistics:
    n_rows, n_vocab = logits_NV.shape
    row_max, sum_exp, target, total = torch.empty(4, n_rows, dtype=torch.float32, device=logits_NV.device)
    argmax = torch.empty(n_rows, dtype=torch.int64, device=logits_NV.device)
    kernel: Any = _statistics_kernel[(n_rows,)]  # type: ignore[index]
    kernel(logits_NV, labels_N, row_max, argmax, sum_exp, target, total, n_vocab, BLOCK=BLOCK, num_warps=8)
    return Statistics(row_max, argmax, sum_exp, target, total)


def gradient(logits_NV: Tensor, labels_N: Tensor, _row_max_N: Tensor, log_norm_N: Tensor, factors: Factors) -> Tensor:
    """Overwrite the logits with their gradient."""
    n_rows, n_vocab = logits_NV.shape
    softmax, target, uniform = factors
    others = (softmax, target, softmax if uniform is None else uniform, n_vocab)
    kernel: Any = _gradient_kernel[(n_rows, triton.cdiv(n_vocab, BLOCK))]  # type: ignore[index]
    kernel(logits_NV, labels_N, log_norm_N, *others, UNIFORM=uniform is not None, BLOCK=BLOCK, num_warps=8)
    return logits_NV


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply by a scalar on the device and round, in one pass; torch takes two, one of them slow."""
    out = torch.empty_like(x, dtype=dtype)
    kernel: Any = _scaled_kernel[(triton.cdiv(x.numel(), BLOCK),)]  # type: ignore[index]
    kernel(x, factor, out, x.numel(), BLOCK=BLOCK, num_warps=8)
    return out
