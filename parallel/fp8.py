"""Linear layers with fp8 matrix products, forward and backward, and tensorwise dynamic scaling.

e4m3 for inputs and weights, e5m2 for gradients (Micikevicius et al. 2022, arXiv:2209.05433). Weights, their gradients
and activations keep their dtype.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.tensor_parallel import RowwiseLinear

scaled_mm: Any = torch._scaled_mm  # type: ignore[attr-defined]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MIN_AMAX = 1e-12  # avoids division by zero
MULTIPLE = 16  # sizes that _scaled_mm accepts


@torch.library.custom_op("pretraining::to_fp8_both_ways", mutates_args=())
def to_fp8_both_ways(x_NM: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `x * scale` in fp8 and its contiguous transpose, for products along either dimension."""
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
    """Return x in fp8, its transpose, and the inverse scale."""
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
    """Return x @ weight.T; each tensor-parallel rank has its own scale."""
    x_NK = x_BTK.flatten(0, -2)
    padding = -len(x_NK) % MULTIPLE  # of the last validation batch
    out_NM: Any = _Product.apply(F.pad(x_NK, (0, 0, 0, padding)) if padding else x_NK, weight_MK)
    return out_NM[: len(x_NK)].unflatten(0, x_BTK.shape[:-1])


class Fp8Linear(nn.Linear):
    """A linear layer with fp8 products; assigned to the `__class__` of an nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:
        out = fp8_product(input, self.weight)
        return out if self.bias is None else out + self.bias


class Fp8RowwiseLinear(RowwiseLinear):
    product = staticmethod(fp8_product)
