"""AdamW's update of a parameter as one Triton kernel, with one read and write of every tensor."""

from typing import Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

BLOCK = 1024


@triton.jit
def _adamw_kernel(
    param, rest, grad, exp_avg, exp_avg_sq, scalars, n, lerp_weight, eps,
    SPLIT: tl.constexpr, KEPT: tl.constexpr, FAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    grad_scale = tl.load(scalars)
    finite = tl.load(scalars + 1)
    decay = tl.load(scalars + 2)
    beta2 = tl.load(scalars + 3)
    beta2_rest = tl.load(scalars + 4)
    step_size = tl.load(scalars + 5)
    bias_correction = tl.load(scalars + 6)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (at < n) & (finite != 0)
    if SPLIT:
        upper = tl.load(param + at, mask=inside, other=0).to(tl.int32)
        lower = tl.load(rest + at, mask=inside, other=0).to(tl.int32)
        p = ((upper << 16) + lower).to(tl.float32, bitcast=True)
    elif KEPT:
        p = tl.load(rest + at, mask=inside, other=0.0)
    else:
        p = tl.load(param + at, mask=inside, other=0.0)
    g = tl.div_rn(tl.load(grad + at, mask=inside, other=0.0).to(tl.float32), grad_scale)
    m = tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(tl.float32)
    # Rounds exactly as torch.optim.AdamW on CUDA: lerp, addcmul and addcdiv end in an fma, and division by a scalar
    # is multiplication by its inverse.
    p = p * decay
    m = tl.fma(m - g, 1.0 - lerp_weight, g) if FAR else tl.fma(g - m, lerp_weight, m)
    v = tl.fma(g * g, beta2_rest, v * beta2)
    denominator = tl.sqrt_rn(v) * bias_correction + eps
    p = tl.fma(tl.div_rn(m, denominator), step_size, p)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    if SPLIT:
        bits = p.to(tl.int32, bitcast=True)
        upper = (bits + 0x8000) >> 16
        tl.store(param + at, upper.to(tl.int16), mask=inside)
        tl.store(rest + at, (bits - (upper << 16)).to(tl.int16), mask=inside)
    elif KEPT:
        tl.store(rest + at, p, mask=inside)
        tl.store(param + at, p, mask=inside)
    else:
        tl.store(param + at, p, mask=inside)


def update(
    param: Tensor,
    rest: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    *,
    beta1: float,
    eps: float,
) -> None:
    """Update one parameter in place.

    `rest` is None for an fp32 parameter, the int16 lower half of the master for bf16, and the fp32 master for fp16.
    `scalars` are fp32 on the device: grad_scale, finite, 1 - lr * weight_decay, beta2, 1 - beta2,
    -lr / (1 - beta1**t), 1 / sqrt(1 - beta2**t).
    """
    halves = rest is not None and rest.dtype == torch.int16
    grid = (triton.cdiv(param.numel(), BLOCK),)
    if not param.numel():
        return
    assert param.is_contiguous()
    kernel: Any = _adamw_kernel
    kernel[grid](
        param.view(torch.int16) if halves else param, param if rest is None else rest, grad.contiguous(),
        exp_avg, exp_avg_sq, scalars, param.numel(), 1 - beta1, eps,
        SPLIT=halves, KEPT=rest is not None and not halves, FAR=1 - beta1 >= 0.5, BLOCK=BLOCK,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
