"""Linear layers whose three products are computed in 8 bits, with one scale a matrix.

Scales come from the numbers at hand (current scaling); e4m3 for inputs and weights, e5m2 for gradients
(Micikevicius et al. 2022, arXiv:2209.05433). Weights, their gradients and everything between products keep their dtype.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard

scaled_mm: Any = torch._scaled_mm  # type: ignore[attr-defined]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of the sizes of matrices that 8-bit products take


@torch.library.custom_op("pretraining::to_fp8_both_ways", mutates_args=())
def to_fp8_both_ways(x_NM: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Give `x * scale` in 8 bits, and the same transposed: a product along each side wants its own order in memory."""
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
    """Give x in 8 bits, transposed too, and what to multiply them with."""
    largest = torch.finfo(dtype).max
    amax = x_NM.abs().amax().float().clamp(min=1e-12)
    return *to_fp8_both_ways(x_NM, largest / amax, dtype), amax / largest


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, weight_MK: Tensor) -> Tensor:
        x, x_turned, x_scale = _quantize(x_NK, E4M3)
        weight, weight_turned, weight_scale = _quantize(weight_MK, E4M3)
        ctx.save_for_backward(x_turned, x_scale, weight_turned, weight_scale)
        return scaled_mm(x, weight.T, x_scale, weight_scale, out_dtype=x_NK.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x_turned, x_scale, weight_turned, weight_scale = ctx.saved_tensors
        grad, grad_turned, grad_scale = _quantize(grad_NM, E5M2)
        settings = {"out_dtype": grad_NM.dtype, "use_fast_accum": False}
        grad_x = scaled_mm(grad, weight_turned.T, grad_scale, weight_scale, **settings)
        return grad_x, scaled_mm(grad_turned, x_turned.T, grad_scale, x_scale, **settings)


class Fp8Linear(nn.Linear):
    """A linear layer that multiplies in 8 bits; made of a plain one by changing its class.

    Of a matrix that is divided over tp each rank multiplies its part, with a scale of its own.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() // input.shape[-1] % MULTIPLE:  # as many tokens as a validation's last batch may have
            return F.linear(input, self.weight, self.bias)
        out = _divided_product(input, self.weight) if isinstance(self.weight, DTensor) else _product(input, self.weight)
        return out if self.bias is None else out + self.bias


def _product(x_BTK: Tensor, weight_MK: Tensor) -> Tensor:
    out_NM = _Product.apply(x_BTK.flatten(0, -2), weight_MK)
    assert isinstance(out_NM, Tensor)
    return out_NM.unflatten(0, x_BTK.shape[:-1])


def _divided_product(x_BTK: Any, weight_MK: DTensor) -> Tensor:
    """Give this rank's columns of the whole product, or what its rows add to it."""
    mesh, (place,) = weight_MK.device_mesh, weight_MK.placements
    assert isinstance(place, Shard)
    last = Shard(x_BTK.ndim - 1)
    of_x, of_out = (Partial(), last) if place.dim == 0 else (last, Partial())
    out = _product(x_BTK.to_local(grad_placements=[of_x]), weight_MK.to_local())
    return DTensor.from_local(out, mesh, [of_out], run_check=False)
