"""Attention: one function, `attend`, over interchangeable backends, and the layer around it."""

import importlib.util
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.config import Attention, ModelConfig, ModelError
from model.layers import rotate

INSTALL = {
    # FlashAttention 4 alone makes a package `flash_attn` too, without this module.
    Attention.flash_attn: ("flash_attn.flash_attn_interface", "pip install -r requirements-gpu.txt (flash-attn)"),
    Attention.flash_attn_4: ("flash_attn.cute", "pip install -r requirements-gpu.txt (flash-attn-4)"),
}


@dataclass(frozen=True, slots=True)
class Segments:
    """Which tokens of a batch see each other: causally, those of one segment.

    `cu_seqlens` int32 (n_segments + 1,) counts over the flattened batch; no segment crosses a row.
    """

    cu_seqlens: Tensor
    max_seq_len: int
    equal: bool  # every segment has max_seq_len tokens
    mask_B1TT: Tensor | None  # True where a query may look; only for backends that need it, made once a batch


def segments_of(cu_seqlens: Tensor, max_seq_len: int, rows: int, row_len: int, backend: Attention) -> Segments:
    """Prepare a batch's segments for a backend, once for all layers."""
    equal = (len(cu_seqlens) - 1) * max_seq_len == rows * row_len
    masked = backend is Attention.reference or (not equal and backend in (Attention.sdpa, Attention.cudnn))
    mask = None
    if masked:
        index_N = torch.arange(rows * row_len, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        segment_BT = torch.bucketize(index_N, cu_seqlens, right=True).view(rows, row_len)
        causal_TT = torch.ones(row_len, row_len, dtype=torch.bool, device=cu_seqlens.device).tril()
        mask = ((segment_BT[:, :, None] == segment_BT[:, None, :]) & causal_TT)[:, None]
    return Segments(cu_seqlens, max_seq_len, equal, mask)


def installed(backend: Attention) -> bool:
    """Say whether the package a backend needs can be imported."""
    package = INSTALL.get(backend, ("torch", ""))[0]
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def resolve_backend(asked: Attention, device: torch.device, dtype: torch.dtype, *, equal: bool) -> Attention:
    """Choose the backend of a batch: `auto` takes the fastest that is installed and right for it.

    Raises `ModelError` if the one asked for cannot run here, with the install line.
    """
    low_precision = dtype in (torch.bfloat16, torch.float16)
    if asked is Attention.auto:
        if device.type != "cuda" or not low_precision:
            return Attention.sdpa
        if torch.cuda.get_device_capability(device)[0] >= 9 and installed(Attention.flash_attn_4):
            return Attention.flash_attn_4
        if installed(Attention.flash_attn):
            return Attention.flash_attn
        return Attention.cudnn if equal else Attention.varlen
    if asked in (Attention.sdpa, Attention.reference):
        return asked
    if device.type != "cuda":
        raise ModelError(f"model.attention ({asked.value}) needs a CUDA device; use model.attention=sdpa on {device}")
    if not low_precision:
        raise ModelError(f"model.attention ({asked.value}) needs bf16 or fp16, not {dtype}; use model.attention=sdpa")
    if not installed(asked):
        raise ModelError(f"model.attention ({asked.value}) is not installed: {INSTALL[asked][1]}")
    return asked


def attend(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, *, segments: Segments, backend: Attention) -> Tensor:
    """Causal attention inside each segment, scaled by 1 / sqrt(K); gives out_BTHK."""
    match backend:
        case Attention.reference:
            assert segments.mask_B1TT is not None
            return _reference(q_BTHK, k_BTGK, v_BTGK, segments.mask_B1TT)
        case Attention.sdpa:
            return _sdpa(q_BTHK, k_BTGK, v_BTGK, segments)
        case Attention.cudnn:
            # With a mask cuDNN is slower than the memory-efficient kernel: it is asked only when none is needed.
            kernels = [SDPBackend.CUDNN_ATTENTION] if segments.equal else [SDPBackend.EFFICIENT_ATTENTION]
            with sdpa_kernel(kernels):
                return _sdpa(q_BTHK, k_BTGK, v_BTGK, segments)
        case Attention.varlen:
            return _varlen(q_BTHK, k_BTGK, v_BTGK, segments)
        case Attention.flash_attn | Attention.flash_attn_4:
            return _flash(q_BTHK, k_BTGK, v_BTGK, segments, backend)
    raise AssertionError(f"{backend} was not resolved")


def _repeat_kv(x_BTGK: Tensor, n_heads: int) -> Tensor:
    return x_BTGK.repeat_interleave(n_heads // x_BTGK.shape[2], dim=2)


def _reference(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask_B1TS: Tensor) -> Tensor:
    k, v = (_repeat_kv(x, q_BTHK.shape[2]).float() for x in (k_BSGK, v_BSGK))
    scores = torch.einsum("bthk,bshk->bhts", q_BTHK.float(), k) * q_BTHK.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask_B1TS, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhts,bshk->bthk", weights, v).type_as(q_BTHK)


def _sdpa(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, segments: Segments) -> Tensor:
    if segments.mask_B1TT is not None:
        return masked_attend(q_BTHK, k_BTGK, v_BTGK, segments.mask_B1TT)
    # All segments are equally long: each is a row of its own.
    q, k, v = (x.reshape(-1, segments.max_seq_len, *x.shape[2:]).transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q_BTHK.shape[2] != k_BTGK.shape[2])
    return out.transpose(1, 2).reshape(q_BTHK.shape)


def masked_attend(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask_B1TS: Tensor) -> Tensor:
    """Attention where `mask_B1TS` is True; for packs on devices without better, and for decoding."""
    n_heads = q_BTHK.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, _repeat_kv(k_BSGK, n_heads), _repeat_kv(v_BSGK, n_heads)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1TS).transpose(1, 2)


def _varlen(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, segments: Segments) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu, longest, n_heads = segments.cu_seqlens, segments.max_seq_len, q_BTHK.shape[2]
    q, k, v = (x.flatten(0, 1) for x in (q_BTHK, _repeat_kv(k_BTGK, n_heads), _repeat_kv(v_BTGK, n_heads)))
    out = varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0))  # no look to the right: causal
    return (out if isinstance(out, Tensor) else out[0]).view(q_BTHK.shape)


def _flash(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, segments: Segments, backend: Attention) -> Tensor:
    if backend is Attention.flash_attn_4:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func  # type: ignore[import-not-found]

        # Its compiler warns of an argument that is not used here, once a shape.
        warnings.filterwarnings("ignore", message="Argument aux_data")
    else:
        from flash_attn import flash_attn_func, flash_attn_varlen_func  # type: ignore[import-not-found]
    longest = segments.max_seq_len
    if segments.equal:
        out = flash_attn_func(*(x.reshape(-1, longest, *x.shape[2:]) for x in (q_BTHK, k_BTGK, v_BTGK)), causal=True)
    else:
        out = flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q_BTHK, k_BTGK, v_BTGK)),
            cu_seqlens_q=segments.cu_seqlens,
            cu_seqlens_k=segments.cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
        )
    return (out if isinstance(out, Tensor) else out[0]).reshape(q_BTHK.shape)


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_dim, bias = config.n_kv_heads * config.head_dim, config.attention_bias
        self.wq = nn.Linear(config.d_model, config.d_model, bias=bias)
        self.wk = nn.Linear(config.d_model, kv_dim, bias=bias)
        self.wv = nn.Linear(config.d_model, kv_dim, bias=bias)
        self.wo = nn.Linear(config.d_model, config.d_model, bias=bias)

    def project(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give q_BTHK, k_BTGK, v_BTGK, the first two turned to their positions."""
        # The number of heads is read off the weights, which may hold a share of them.
        q_BTHK = rotate(self.wq(x_BTD).unflatten(-1, (-1, self.head_dim)), cos, sin)
        k_BTGK = rotate(self.wk(x_BTD).unflatten(-1, (-1, self.head_dim)), cos, sin)
        return q_BTHK, k_BTGK, self.wv(x_BTD).unflatten(-1, (-1, self.head_dim))
