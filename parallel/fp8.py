"""Linear layers whose three matrix products are computed in 8 bits, with one scale per matrix.

Scales come from the current values; e4m3 for inputs and weights, e5m2 for gradients (Micikevicius et al. 2022,
arXiv:2209.05433). Weights, their gradients and everything between products keep their dtype.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.tensor_parallel import RowwiseLinear

scaled_mm: Any = torch._scaled_mm  # type: ignore[attr-defined]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MIN_AMAX = 1e-12  # so that a matrix of zeros has a scale too
MULTIPLE = 16  # of the sizes of matrices that 8-bit products take


@torch.library.custom_op("pretraining::to_fp8_both_ways", mutates_args=())
def to_fp8_both_ways(x_NM: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `x * scale` in 8 bits, and its contiguous transpose: products along either dimension need their own."""
    if x_NM.is_cuda:
        from parallel.fp8_kernel import cast_both_ways

        return cast_both_ways(x_NM, scale, dtype)
    largest = torch.finfo(dtype).max
    cast = (x_NM.float() * scale).clamp(-largest, largest).to(dtype)
    return cast, cast.T.contiguous()


@to_fp8_both_ways.register_fake
def _(x_NM: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    n, m = x_NM.shape
    return x_NM.new_empty(n, m, dtype=dtype), x_NM.new_empty(m, n, dtype=dtype)


def _quantize(x_NM: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return x in 8 bits, its transpose, and the factor that scales them back."""
    largest = torch.finfo(dtype).max
    amax = x_NM.abs().amax().float().clamp(min=MIN_AMAX)
    return *to_fp8_both_ways(x_NM, largest / amax, dtype), amax / largest


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, weight_MK: Tensor) -> Tensor:
        x, x_t, x_scale = _quantize(x_NK, E4M3)
        weight, weight_t, weight_scale = _quantize(weight_MK, E4M3)
        ctx.save_for_backward(x_t, x_scale, weight_t, weight_scale)
        return scaled_mm(x, weight.T, x_scale, weight_scale, out_dtype=x_NK.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x_t, x_scale, weight_t, weight_scale = ctx.saved_tensors
        grad, grad_t, grad_scale = _quantize(grad_NM, E5M2)
        grad_x = scaled_mm(grad, weight_t.T, grad_scale, weight_scale, out_dtype=grad_NM.dtype)
        return grad_x, scaled_mm(grad_t, x_t.T, grad_scale, x_scale, out_dtype=grad_NM.dtype)


def fp8_product(x_BTK: Tensor, weight_MK: Tensor) -> Tensor:
    """Return x @ weight.T; tensor-parallel ranks have a scale each."""
    x_NK = x_BTK.flatten(0, -2)
    padding = -len(x_NK) % MULTIPLE  # for the last batch of a validation
    out_NM: Any = _Product.apply(F.pad(x_NK, (0, 0, 0, padding)) if padding else x_NK, weight_MK)
    return out_NM[: len(x_NK)].unflatten(0, x_BTK.shape[:-1])


class Fp8Linear(nn.Linear):
    """A linear layer that multiplies in 8 bits; a plain one becomes it by changing its class."""

    def forward(self, input: Tensor) -> Tensor:
        out = fp8_product(input, self.weight)
        return out if self.bias is None else out + self.bias


class Fp8RowwiseLinear(RowwiseLinear):
    product = staticmethod(fp8_product)
