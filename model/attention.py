"""Attention backends behind one function, `attend`, the attention layer, and its cache for decoding."""

import warnings
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.config import Attention, ModelConfig, ModelError
from model.layers import ByDepth, Weight, linears, rotate


@dataclass(frozen=True, slots=True)
class Segments:
    """Segments of a batch, each with causal attention inside it, and the backend.

    `cu_seqlens` int32 (n_segments + 1,) are bounds in the flattened batch; no segment crosses a row.
    """

    backend: Attention
    cu_seqlens: Tensor
    max_seq_len: int
    equal: bool  # every segment has max_seq_len tokens
    mask_B1TT: Tensor | None  # True where a query can attend; only for backends that need it

    @staticmethod
    def of(cu_seqlens: Tensor, max_seq_len: int, shape: tuple[int, int], choice: Attention, dtype: torch.dtype):
        """Prepare a batch of (rows, row_len) tokens for all layers; raise `ModelError` as `resolve_backend` does."""
        rows, row_len = shape
        equal = (len(cu_seqlens) - 1) * max_seq_len == rows * row_len
        backend = resolve_backend(choice, cu_seqlens.device, dtype, equal=equal)
        mask = None
        if backend is Attention.reference or (not equal and backend in (Attention.sdpa, Attention.cudnn)):
            index_N = torch.arange(rows * row_len, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
            segment_BT = torch.bucketize(index_N, cu_seqlens, right=True).view(rows, row_len)
            causal_TT = torch.ones(row_len, row_len, dtype=torch.bool, device=cu_seqlens.device).tril()
            mask = ((segment_BT[:, :, None] == segment_BT[:, None, :]) & causal_TT)[:, None]
        return Segments(backend, cu_seqlens, max_seq_len, equal, mask)


@cache
def missing(backend: Attention) -> str | None:
    """Return how to install a missing backend; None if it is installed."""
    two, four = _version("flash-attn"), _version("flash-attn-4")
    if backend is Attention.flash_attn and two < (2, 0):
        return 'pip install "flash-attn>=2.8,<3"'
    if backend is Attention.flash_attn_4 and four < (4, 0):
        return "pip install flash-attn-4"
    if backend is Attention.flash_attn_4 and two >= (2, 8):  # both install flash_attn/cute
        return "pip uninstall flash-attn, which shares files with it; pip install --force-reinstall flash-attn-4"
    return None


def _version(distribution: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in metadata.version(distribution).split(".")[:2])
    except metadata.PackageNotFoundError:
        return ()


def resolve_backend(choice: Attention, device: torch.device, dtype: torch.dtype, *, equal: bool) -> Attention:
    """Return the backend for a batch; `auto` is the fastest installed one.

    Raise `ModelError`, with the remedy, if the backend cannot run.
    """
    fused = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if choice is Attention.auto:
        if not fused:
            return Attention.sdpa
        if torch.cuda.get_device_capability(device)[0] >= 9 and not missing(Attention.flash_attn_4):
            return Attention.flash_attn_4
        if not missing(Attention.flash_attn):
            return Attention.flash_attn
        return Attention.cudnn if equal else Attention.varlen
    if choice in (Attention.sdpa, Attention.reference):
        return choice
    if not fused:
        needs = f"needs bf16 or fp16 on a CUDA device, not {dtype} on {device}"
        raise ModelError(f"model.attention ({choice.value}) {needs}; use sdpa")
    if remedy := missing(choice):
        raise ModelError(f"model.attention ({choice.value}) is not installed: {remedy}")
    return choice


def attend(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, *, segments: Segments) -> Tensor:
    """Causal attention inside each segment, scaled by 1 / sqrt(K); returns out_BTHK."""
    match segments.backend:
        case Attention.reference:
            return _reference(q_BTHK, k_BTGK, v_BTGK, segments)
        case Attention.cudnn:
            # cuDNN is slower than the memory-efficient kernel with a mask, and lacks some head sizes.
            kernels = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *kernels] if segments.equal else kernels, set_priority=True):
                return _sdpa(q_BTHK, k_BTGK, v_BTGK, segments)
        case Attention.varlen:
            return _varlen(q_BTHK, k_BTGK, v_BTGK, segments)
        case Attention.flash_attn | Attention.flash_attn_4:
            return _flash(q_BTHK, k_BTGK, v_BTGK, segments)
        case _:
            return _sdpa(q_BTHK, k_BTGK, v_BTGK, segments)


def _repeat_kv(x_BTGK: Tensor, n_heads: int) -> Tensor:
    return x_BTGK.repeat_interleave(n_heads // x_BTGK.shape[2], dim=2)


def _reference(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, segments: Segments) -> Tensor:
    assert segments.mask_B1TT is not None
    k, v = (_repeat_kv(x, q_BTHK.shape[2]).float() for x in (k_BTGK, v_BTGK))
    scores = torch.einsum("bthk,bshk->bhts", q_BTHK.float(), k) * q_BTHK.shape[-1] ** -0.5
    weights = scores.masked_fill(~segments.mask_B1TT, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhts,bshk->bthk", weights, v).type_as(q_BTHK)


def _sdpa(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, segments: Segments) -> Tensor:
    if segments.mask_B1TT is not None:
        return masked_attend(q_BTHK, k_BTGK, v_BTGK, segments.mask_B1TT)
    # All segments have the same length, so make each a row.
    q, k, v = (x.reshape(-1, segments.max_seq_len, *x.shape[2:]).transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q_BTHK.shape[2] != k_BTGK.shape[2])
    return out.transpose(1, 2).reshape(q_BTHK.shape)


def masked_attend(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask_B1TS: Tensor) -> Tensor:
    """Attention where `mask_B1TS` is True; for decoding, and for packs without a varlen kernel."""
    n_heads = q_BTHK.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, _repeat_kv(k_BSGK, n_heads), _repeat_kv(v_BSGK, n_heads)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1TS).transpose(1, 2)


def _varlen(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, segments: Segments) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu, longest, n_heads = segments.cu_seqlens, segments.max_seq_len, q_BTHK.shape[2]
    q, k, v = (x.flatten(0, 1) for x in (q_BTHK, _repeat_kv(k_BTGK, n_heads), _repeat_kv(v_BTGK, n_heads)))
    out = varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0))  # causal
    return (out if isinstance(out, Tensor) else out[0]).view(q_BTHK.shape)


def _flash(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, segments: Segments) -> Tensor:
    if segments.backend is Attention.flash_attn_4:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func  # type: ignore[import-not-found]

        # The compiler warns of an unused argument, once per shape.
        warnings.filterwarnings("ignore", message="Argument aux_data")
    else:
        from flash_attn import flash_attn_func, flash_attn_varlen_func  # type: ignore[import-not-found]
    cu, longest = segments.cu_seqlens, segments.max_seq_len
    if segments.equal:
        out = flash_attn_func(*(x.reshape(-1, longest, *x.shape[2:]) for x in (q_BTHK, k_BTGK, v_BTGK)), causal=True)
    else:
        lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
        out = flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q_BTHK, k_BTGK, v_BTGK)), **lengths, causal=True)
    return (out if isinstance(out, Tensor) else out[0]).reshape(q_BTHK.shape)


class KVCache:
    """Keys and values for `rows` texts of up to `max_len` tokens, written at each token's position.

    Rows may have different lengths: prompts are padded on the right, and the entries of the padding
    are overwritten before any query attends to them.
    """

    def __init__(self, config: ModelConfig, rows: int, max_len: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.n_layers, rows, max_len, config.n_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.row_B1 = torch.arange(rows, device=device)[:, None]
        self.positions_BT = torch.zeros(rows, 0, dtype=torch.int64, device=device)
        self.extent = 0  # length of the longest row
        self.mask_B1TS = torch.zeros(rows, 1, 0, 0, dtype=torch.bool, device=device)

    def set_positions(self, positions_BT: Tensor) -> None:
        """Set the positions of the next forward pass, once for all layers."""
        self.positions_BT = positions_BT
        self.extent = max(self.extent, int(positions_BT.max()) + 1)
        steps_S = torch.arange(self.extent, device=positions_BT.device)
        self.mask_B1TS = (steps_S <= positions_BT[..., None])[:, None]

    def update(self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values of a layer; return all of its keys and values, (B, S, G, K)."""
        self.keys[layer][self.row_B1, self.positions_BT] = k_BTGK
        self.values[layer][self.row_B1, self.positions_BT] = v_BTGK
        return self.keys[layer][:, : self.extent], self.values[layer][:, : self.extent]


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions (Ainslie et al. 2023, arXiv:2305.13245).

    An attention layer has `project`, before `attend`, and `output`, after it, which can also return auxiliary losses.
    """

    WEIGHTS: ClassVar = {  # standard deviations: internlm, internlm_v1, llama
        "wq": Weight("colwise", "self_attn.q_proj", 0.006, 0.006, 0.02),
        "wk": Weight("colwise", "self_attn.k_proj", 0.006, 0.006, 0.02),
        "wv": Weight("colwise", "self_attn.v_proj", 0.006, 0.006, 0.02),
        "wo": Weight("rowwise", "self_attn.o_proj", ByDepth(0.006), ByDepth(0.006), ByDepth(0.02)),
    }

    linears = staticmethod(linears)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_dim, bias = config.n_kv_heads * config.head_dim, config.attention_bias
        self.wq = nn.Linear(config.d_model, config.d_model, bias=bias)
        self.wk = nn.Linear(config.d_model, kv_dim, bias=bias)
        self.wv = nn.Linear(config.d_model, kv_dim, bias=bias)
        self.wo = nn.Linear(config.d_model, config.d_model, bias=bias)

    def project(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q_BTHK, k_BTGK, v_BTGK; q and k are rotated."""
        # The number of heads depends on the weights, which tensor parallelism splits.
        outs = self.linears(x_BTD, self.wq, self.wk, self.wv)
        q_BTHK, k_BTGK, v_BTGK = (out.unflatten(-1, (-1, self.head_dim)) for out in outs)
        return rotate(q_BTHK, cos, sin), rotate(k_BTGK, cos, sin), v_BTGK

    def output(self, out_BTHK: Tensor) -> Tensor:
        return self.wo(out_BTHK.flatten(-2))

    def forward_flops(self, seq_len: int) -> int:
        """Return FLOPs per token: two per weight, and two products with (seq_len + 1) / 2 keys on average."""
        weights = sum(linear.weight.numel() for linear in (self.wq, self.wk, self.wv, self.wo))
        return 2 * weights + 2 * self.wo.in_features * (seq_len + 1)
