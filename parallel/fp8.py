"""Linear layers whose three products are computed in 8 bits, with one scale a matrix.

Scales come from the numbers at hand (current scaling); e4m3 for inputs and weights, e5m2 for gradients
(Micikevicius et al. 2022, arXiv:2209.05433). Weights, their gradients and everything between products keep their dtype;
where ranks hold shards of weights, they are cast before they are gathered.
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
LARGEST = torch.finfo(E4M3).max
LEAST = 1e-12  # number that a matrix is scaled by; a matrix of zeros has a scale too
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
    amax = x_NM.abs().amax().float().clamp(min=LEAST)
    return *to_fp8_both_ways(x_NM, largest / amax, dtype), amax / largest


class GatheredWeight(Tensor):
    """A matrix that FSDP gathered in 8 bits, and that it and autograd take for one of the dtype it was cast from."""

    in_8_bits: Tensor  # e4m3: the numbers times LARGEST / amax
    amax: Tensor  # scalar, fp32: the largest of all ranks' numbers

    @staticmethod
    def __new__(cls, in_8_bits: Tensor, amax: Tensor, dtype: torch.dtype) -> "GatheredWeight":
        strides, device = in_8_bits.stride(), in_8_bits.device
        make: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        self = make(cls, in_8_bits.shape, strides=strides, dtype=dtype, device=device)
        self.in_8_bits, self.amax = in_8_bits, amax
        return self

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"GatheredWeight({tuple(self.shape)}, {self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["in_8_bits", "amax"], self.dtype

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], dtype: torch.dtype, *_: Any) -> "GatheredWeight":
        return GatheredWeight(inner["in_8_bits"], inner["amax"], dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        """Give views, which FSDP, DTensor and autograd ask for; nothing but a product computes with it."""
        weight, *how = args
        if not func.is_view:
            raise NotImplementedError(f"{func} of a matrix that was gathered in 8 bits")
        return GatheredWeight(func(weight.in_8_bits, *how), weight.amax, weight.dtype)


@torch.library.custom_op("pretraining::times_unturned", mutates_args=())
def times_unturned(
    grad_NM: Tensor, weight_MK: Tensor, grad_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Give grad @ weight: one operation, because a compiler would turn the weight in the forward pass and keep that."""
    turned_KM = to_fp8_both_ways(weight_MK, torch.ones_like(weight_scale), E4M3)[1]
    return scaled_mm(grad_NM, turned_KM.T, grad_scale, weight_scale, out_dtype=dtype)


@times_unturned.register_fake
def _(grad_NM: Tensor, weight_MK: Tensor, grad_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return grad_NM.new_empty(grad_NM.shape[0], weight_MK.shape[1], dtype=dtype)


@register_flop_formula(torch.ops.pretraining.times_unturned)
def _(grad_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(grad_shape) * weight_shape[1]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, weight_MK: Tensor) -> Tensor:
        x, x_turned, x_scale = _quantize(x_NK, E4M3)
        ctx.gathered = isinstance(weight_MK, GatheredWeight)
        if isinstance(weight_MK, GatheredWeight):
            # Not turned: what is kept is FSDP's, which frees it and gathers it again.
            weight = kept = weight_MK.in_8_bits
            weight_scale = weight_MK.amax / LARGEST
        else:
            weight, kept, weight_scale = _quantize(weight_MK, E4M3)
        ctx.save_for_backward(x_turned, x_scale, kept, weight_scale)
        return scaled_mm(x, weight.T, x_scale, weight_scale, out_dtype=x_NK.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x_turned, x_scale, weight, weight_scale = ctx.saved_tensors
        grad, grad_turned, grad_scale = _quantize(grad_NM, E5M2)
        dtype = grad_NM.dtype
        if ctx.gathered:
            grad_x = times_unturned(grad, weight, grad_scale, weight_scale, dtype)
        else:
            grad_x = scaled_mm(grad, weight.T, grad_scale, weight_scale, out_dtype=dtype)
        return grad_x, scaled_mm(grad_turned, x_turned.T, grad_scale, x_scale, out_dtype=dtype)


class Fp8Linear(nn.Linear):
    """A linear layer that multiplies in 8 bits; made of a plain one by changing its class.

    Of a matrix that is divided over tp each rank multiplies its part, with a scale of its own.
    """

    cast: "ShardCast | None" = None  # of this rank's shard of the weight, where FSDP gathers it

    def forward(self, input: Tensor) -> Tensor:
        out = _divided_product(input, self.weight) if isinstance(self.weight, DTensor) else _product(input, self.weight)
        return out if self.bias is None else out + self.bias


def _product(x_BTK: Tensor, weight_MK: Tensor) -> Tensor:
    x_NK = x_BTK.flatten(0, -2)
    n_tokens = len(x_NK)
    missing = -n_tokens % MULTIPLE  # of a validation's last batch: zeros stand for them
    out_NM: Any = _Product.apply(F.pad(x_NK, (0, 0, 0, missing)) if missing else x_NK, weight_MK)
    return out_NM[:n_tokens].unflatten(0, x_BTK.shape[:-1])


def _divided_product(x_BTK: Any, weight_MK: DTensor) -> Tensor:
    """Give this rank's columns of the whole product, or what its rows add to it."""
    mesh, (place,) = weight_MK.device_mesh, weight_MK.placements
    assert isinstance(place, Shard)
    last = Shard(x_BTK.ndim - 1)
    of_x, of_out = (Partial(), last) if place.dim == 0 else (last, Partial())
    out = _product(x_BTK.to_local(grad_placements=[of_x]), weight_MK.to_local())
    return DTensor.from_local(out, mesh, [of_out], run_check=False)


@dataclass(frozen=True, slots=True)
class ShardCast:
    """Casts a rank's shard of a matrix for FSDP, which looks for these two methods on the shard and then calls them."""

    shard_MK: Tensor  # with the rows of zeros that fill it up to what other ranks have
    amax: Tensor  # scalar, fp32: the largest of all ranks' numbers; NaN until the ranks have agreed on it

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor], None]:
        return (to_fp8_both_ways(self.shard_MK, LARGEST / self.amax, E4M3)[0],), None

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor], _: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[()]]:
        """Say what was gathered, the first time: FSDP gathers into the same memory again."""
        return GatheredWeight(gathered[0], self.amax, dtype) if out is None else out, ()


def cast_before_gathering(model: nn.Module) -> None:
    """Have FSDP gather the weights of 8-bit layers in 8 bits: the same that a cast of the gathered ones would give."""
    for module in model.modules():
        if isinstance(module, Fp8Linear):
            weight: Any = module.weight
            shard = weight._local_tensor  # where FSDP looks; to_local() may give a view of it
            n_columns = shard.shape[1]
            n_rows = shard.untyped_storage().nbytes() // shard.element_size() // n_columns
            padded_MK = shard.data.as_strided((n_rows, n_columns), (n_columns, 1))
            module.cast = cast = ShardCast(padded_MK, torch.full((), torch.nan, device=shard.device))
            shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = cast.fsdp_pre_all_gather, cast.fsdp_post_all_gather


@torch.no_grad()
def agree_on_scales(casts: Sequence[ShardCast], group: dist.ProcessGroup) -> None:
    """Find the largest numbers of all matrices as they are now, in one message over the ranks that have shards."""
    each: Any = torch  # has these two, but not by its types
    norms = each._foreach_norm([cast.shard_MK for cast in casts], math.inf)
    amax_W = torch.stack(norms).float().clamp(min=LEAST)
    dist.all_reduce(amax_W, op=dist.ReduceOp.MAX, group=group)
    each._foreach_copy_([cast.amax for cast in casts], list(amax_W.unbind()))
