"""Which backend is chosen, and how FlashAttention is called; CUDA backends against the reference."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from model.attention import Segments, attend, missing, resolve_backend
from model.config import Attention, ModelError

CUDA = torch.device("cuda")


def one_segment(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
    times = q_THK.shape[1] // k_TGK.shape[1]
    q, k, v = (x.float() for x in (q_THK, k_TGK.repeat_interleave(times, 1), v_TGK.repeat_interleave(times, 1)))
    scores = torch.einsum("thk,shk->hts", q, k) * q.shape[-1] ** -0.5
    future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("hts,shk->thk", scores.masked_fill(future, -torch.inf).softmax(-1), v).type_as(q_THK)


def check(dims: int, q: Tensor, k: Tensor, v: Tensor, others: dict[str, object]) -> None:
    """Check what the compiled functions check of their inputs."""
    for x in (q, k, v):
        assert x.ndim == dims and x.stride(-1) == 1 and x.dtype in (torch.float16, torch.bfloat16)
    assert q.shape[-2] % k.shape[-2] == 0 and k.shape == v.shape
    assert others.pop("causal") and not others


# The first arguments of flash-attn 2.8, in their order; all that come behind them have defaults.
def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **others: object) -> Tensor:
    check(4, q, k, v, others)
    return torch.stack([one_segment(*row) for row in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    **others: object,
) -> Tensor:  # fmt: skip
    check(3, q, k, v, others)
    for cu_seqlens, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
        assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous() and isinstance(longest, int)
        assert cu_seqlens[0] == 0 and cu_seqlens[-1] == len(q) and longest >= cu_seqlens.diff().max()
    ends = cu_seqlens_q.tolist()
    return torch.cat([one_segment(q[a:b], k[a:b], v[a:b]) for a, b in pairwise(ends)])


@pytest.mark.parametrize("lengths", [[16] * 4, [5, 27, 1, 31]], ids=["equal", "uneven"])
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_flash_attn_2_equals_reference(monkeypatch: pytest.MonkeyPatch, lengths: list[int], n_kv_heads: int) -> None:
    package = ModuleType("flash_attn")
    for function in (flash_attn_func, flash_attn_varlen_func):
        setattr(package, function.__name__, function)
    monkeypatch.setitem(sys.modules, "flash_attn", package)  # itself needs a CUDA build
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 32, heads, 8, generator=generator).bfloat16() for heads in (4, n_kv_heads, n_kv_heads)]
    grad = torch.randn(2, 32, 4, 8, generator=generator)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    found = []
    for backend in (Attention.reference, Attention.flash_attn):
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        segments = replace(
            Segments.of(cu_seqlens, max(lengths), (2, 32), Attention.reference, q.dtype), backend=backend
        )
        out = attend(q, k, v, segments=segments)
        found.append((out, *torch.autograd.grad((out * grad).sum(), (q, k, v))))
    for exact, other in zip(*found, strict=True):
        torch.testing.assert_close(exact, other, rtol=2e-2, atol=2e-2)


BOTH = {"flash-attn": "2.8.3.post2", "flash-attn-4": "4.0.0b36"}


@pytest.mark.parametrize(
    ("installed", "hopper", "ampere"),
    [
        ({}, "varlen", "varlen"),
        ({"flash-attn": "2.8.3.post2"}, "flash_attn", "flash_attn"),  # has a flash_attn/cute that is not version 4
        ({"flash-attn-4": "4.0.0b36"}, "flash_attn_4", "varlen"),
        (BOTH, "flash_attn", "flash_attn"),  # one may have overwritten files of the other's
        ({**BOTH, "flash-attn": "2.7.4"}, "flash_attn_4", "flash_attn"),  # shares no files
        ({"flash-attn": "1.0.9"}, "varlen", "varlen"),
    ],
)
def test_auto_backend_by_installed_distributions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], hopper: str, ampere: str
) -> None:
    for name, version in installed.items():
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    missing.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "path", [str(tmp_path)])
            for capability, expected in (((9, 0), hopper), ((8, 0), ampere)):
                patch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
                assert resolve_backend(Attention.auto, CUDA, torch.bfloat16, equal=False).value == expected
            for name in ("flash_attn", "flash_attn_4"):
                if name not in (hopper, ampere):
                    with pytest.raises(ModelError, match=rf"model\.attention \({name}\) .* pip (un)?install"):
                        resolve_backend(Attention(name), CUDA, torch.bfloat16, equal=False)
    finally:
        missing.cache_clear()


@pytest.mark.parametrize("backend", ["flash_attn_4", "flash_attn", "varlen", "cudnn"])
def test_cuda_backend_is_refused_on_the_cpu_and_in_fp32(backend: str) -> None:
    for device, dtype in ((torch.device("cpu"), torch.bfloat16), (CUDA, torch.float32)):
        with pytest.raises(ModelError, match=rf"model\.attention \({backend}\) needs bf16 or fp16 on a CUDA device"):
            resolve_backend(Attention(backend), device, dtype, equal=True)


BACKENDS = [Attention.flash_attn_4, Attention.flash_attn, Attention.varlen, Attention.cudnn, Attention.sdpa]
PACKS = {"equal": [256] * 8, "uneven": [100, 412, 7, 505, 1024]}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pack", list(PACKS))
@pytest.mark.parametrize(("n_kv_heads", "head_dim"), [(8, 128), (2, 128), (2, 64)])
def test_backend_is_as_exact_as_bf16_allows(backend: Attention, pack: str, n_kv_heads: int, head_dim: int) -> None:
    if remedy := missing(backend):
        pytest.skip(remedy)
    lengths = PACKS[pack]
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [
        torch.randn(2, 1024, heads, head_dim, device="cuda", dtype=torch.bfloat16, generator=generator)
        for heads in (8, n_kv_heads, n_kv_heads, 8)
    ]
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    results = []
    kinds = ((Attention.reference, torch.float32), (Attention.reference, torch.bfloat16), (backend, torch.bfloat16))
    for kind, dtype in kinds:
        q, k, v, grad = (x.detach().to(dtype).requires_grad_() for x in inputs)
        out = attend(q, k, v, segments=Segments.of(cu_seqlens, max(lengths), (2, 1024), kind, dtype))
        results.append((out.detach(), *torch.autograd.grad(out, (q, k, v), grad)))
    for exact, rounded, found in zip(*results, strict=True):
        allowed = 3 * (rounded.float() - exact).abs().max() + 1e-3
        assert (found.float() - exact).abs().max() <= allowed
