"""Linear layers whose three matrix products are computed in 8 bits, with one scale per matrix.

Scales come from the current values; e4m3 for inputs and weights, e5m2 for gradients (Micikevicius et al. 2022,
arXiv:2209.05433). Weights, their gradients and everything between products keep their dtype. Where FSDP shards weights,
they are cast before they are gathered.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.utils.flop_counter import register_flop_formula

scaled_mm: Any = torch._scaled_mm  # type: ignore[attr-defined]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
E4M3_MAX = torch.finfo(E4M3).max
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


class GatheredWeight(Tensor):
    """A matrix that FSDP gathered in 8 bits, which to FSDP and autograd has the dtype it was cast from."""

    in_8_bits: Tensor  # e4m3: the values times E4M3_MAX / amax
    amax: Tensor  # scalar, fp32: the largest absolute value of all ranks

    @staticmethod
    def __new__(cls, in_8_bits: Tensor, amax: Tensor, dtype: torch.dtype) -> "GatheredWeight":
        make: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        shape, strides = in_8_bits.shape, in_8_bits.stride()
        self = make(cls, shape, strides=strides, dtype=dtype, device=in_8_bits.device)
        self.in_8_bits, self.amax = in_8_bits, amax
        return self

    def __repr__(self, *_: Any, **__: Any) -> str:  # the compiler calls it
        return f"GatheredWeight({tuple(self.shape)}, {self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["in_8_bits", "amax"], self.dtype

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], dtype: torch.dtype, *_: Any) -> "GatheredWeight":
        return GatheredWeight(inner["in_8_bits"], inner["amax"], dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        """Allow views, which FSDP, DTensor and autograd take; only a product computes with the values."""
        weight, *rest = args
        if not func.is_view:
            raise NotImplementedError(f"{func} of a matrix that was gathered in 8 bits")
        return GatheredWeight(func(weight.in_8_bits, *rest), weight.amax, weight.dtype)


@torch.library.custom_op("pretraining::mm_transposing_weight", mutates_args=())
def mm_transposing_weight(
    grad_NM: Tensor, weight_MK: Tensor, grad_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return grad @ weight. One op, or a compiler would transpose the weight in the forward pass and keep that."""
    weight_KM = to_fp8_both_ways(weight_MK, torch.ones_like(weight_scale), E4M3)[1]
    return scaled_mm(grad_NM, weight_KM.T, grad_scale, weight_scale, out_dtype=dtype)


@mm_transposing_weight.register_fake
def _(grad_NM: Tensor, weight_MK: Tensor, grad_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return grad_NM.new_empty(grad_NM.shape[0], weight_MK.shape[1], dtype=dtype)


@register_flop_formula(torch.ops.pretraining.mm_transposing_weight)
def _(grad_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(grad_shape) * weight_shape[1]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, weight_MK: Tensor) -> Tensor:
        x, x_t, x_scale = _quantize(x_NK, E4M3)
        ctx.gathered = isinstance(weight_MK, GatheredWeight)
        if isinstance(weight_MK, GatheredWeight):
            weight = saved = weight_MK.in_8_bits  # whose memory FSDP frees, to gather it again
            weight_scale = weight_MK.amax / E4M3_MAX
        else:
            weight, saved, weight_scale = _quantize(weight_MK, E4M3)
        ctx.save_for_backward(x_t, x_scale, saved, weight_scale)
        return scaled_mm(x, weight.T, x_scale, weight_scale, out_dtype=x_NK.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x_t, x_scale, weight, weight_scale = ctx.saved_tensors
        grad, grad_t, grad_scale = _quantize(grad_NM, E5M2)
        dtype = grad_NM.dtype
        if ctx.gathered:
            grad_x = mm_transposing_weight(grad, weight, grad_scale, weight_scale, dtype)
        else:
            grad_x = scaled_mm(grad, weight.T, grad_scale, weight_scale, out_dtype=dtype)
        return grad_x, scaled_mm(grad_t, x_t.T, grad_scale, x_scale, out_dtype=dtype)


class Fp8Linear(nn.Linear):
    """A linear layer that multiplies in 8 bits; a plain one becomes it by changing its class."""

    cast: "ShardCast | None" = None  # of this rank's shard of the weight, where FSDP gathers it

    def forward(self, input: Tensor) -> Tensor:
        out = _tp_product(input, self.weight) if isinstance(self.weight, DTensor) else _product(input, self.weight)
        return out if self.bias is None else out + self.bias


def _product(x_BTK: Tensor, weight_MK: Tensor) -> Tensor:
    x_NK = x_BTK.flatten(0, -2)
    padding = -len(x_NK) % MULTIPLE  # for the last batch of a validation
    out_NM: Any = _Product.apply(F.pad(x_NK, (0, 0, 0, padding)) if padding else x_NK, weight_MK)
    return out_NM[: len(x_NK)].unflatten(0, x_BTK.shape[:-1])


def _tp_product(x_BTK: Tensor, weight_MK: DTensor) -> Tensor:
    """Return this rank's columns of the product, or its part of the sum; each rank has its own scale."""
    (placement,) = weight_MK.placements
    assert isinstance(x_BTK, DTensor) and isinstance(placement, Shard)
    last = Shard(x_BTK.ndim - 1)
    of_x, of_out = (Partial(), last) if placement.dim == 0 else (last, Partial())
    out = _product(x_BTK.to_local(grad_placements=[of_x]), weight_MK.to_local())
    return DTensor.from_local(out, weight_MK.device_mesh, [of_out], run_check=False)


@dataclass(frozen=True, slots=True)
class ShardCast:
    """Casts a rank's shard of a matrix for FSDP, which calls these two methods if it finds them on the shard."""

    shard_MK: Tensor  # padded with rows of zeros to the size of the other ranks' shards
    amax: Tensor  # scalar, fp32: the largest absolute value of all ranks; NaN before the first `reduce_scales`

    def fsdp_pre_all_gather(self, *_: Any) -> tuple[tuple[Tensor], None]:
        return (to_fp8_both_ways(self.shard_MK, E4M3_MAX / self.amax, E4M3)[0],), None

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor], _: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[()]]:
        """Return what was gathered, once: from then on FSDP gathers into the same memory."""
        return GatheredWeight(gathered[0], self.amax, dtype) if out is None else out, ()


def cast_before_gathering(model: nn.Module) -> None:
    """Let FSDP gather the weights of 8-bit layers in 8 bits, with the result of casting the gathered ones."""
    for module in model.modules():
        if isinstance(module, Fp8Linear):
            weight: Any = module.weight
            shard = weight._local_tensor  # where FSDP looks; to_local() may return a view of it
            n_columns = shard.shape[1]
            n_rows = shard.untyped_storage().nbytes() // shard.element_size() // n_columns
            padded_MK = shard.data.as_strided((n_rows, n_columns), (n_columns, 1))
            module.cast = cast = ShardCast(padded_MK, torch.full((), torch.nan, device=shard.device))
            shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = cast.fsdp_pre_all_gather, cast.fsdp_post_all_gather


@torch.no_grad()
def reduce_scales(casts: Sequence[ShardCast], group: dist.ProcessGroup) -> None:
    """Set the largest absolute values of all matrices, in one all-reduce over the ranks that share them."""
    foreach: Any = torch  # its types lack _foreach_norm and _foreach_copy_
    norms = foreach._foreach_norm([cast.shard_MK for cast in casts], math.inf)
    amax_W = torch.stack(norms).float().clamp(min=MIN_AMAX)
    dist.all_reduce(amax_W, op=dist.ReduceOp.MAX, group=group)
    foreach._foreach_copy_([cast.amax for cast in casts], list(amax_W.unbind()))
