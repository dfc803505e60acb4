"""Which backend is chosen, and how FlashAttention is called; CUDA backends against the reference."""

import sys
from dataclasses import replace
from importlib import metadata
from types import ModuleType

import pytest
import torch
from torch import Tensor

from model.attention import Segments, attend, missing, resolve_backend
from model.config import Attention, ModelError

CUDA = torch.device("cuda")


# The first arguments of flash-attn 2.8, in their order; all that come behind them have defaults.
def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    rows, length = q.shape[:2]
    cu_seqlens = torch.arange(rows + 1).int() * length
    others = (cu_seqlens, cu_seqlens, length, length)
    out = flash_attn_varlen_func(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *others, causal=causal)
    return out.view(q.shape)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, causal: bool,
) -> Tensor:  # fmt: skip
    assert causal and all(x.ndim == 3 and x.stride(-1) == 1 and x.dtype == torch.bfloat16 for x in (q, k, v))
    assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    segments = Segments.of(cu_seqlens_q, max_seqlen_q, (1, len(q)), Attention.reference, q.dtype)
    return attend(q[None], k[None], v[None], segments=segments)[0]


@pytest.mark.parametrize("lengths", [[16] * 4, [5, 27, 1, 31]], ids=["equal", "uneven"])
def test_flash_attn_2_equals_reference(monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> None:
    package = ModuleType("flash_attn")  # itself needs a CUDA build
    vars(package).update(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 32, heads, 8, generator=generator).bfloat16() for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    segments = Segments.of(cu_seqlens, max(lengths), (2, 32), Attention.reference, q.dtype)
    found = attend(q, k, v, segments=replace(segments, backend=Attention.flash_attn))
    torch.testing.assert_close(found, attend(q, k, v, segments=segments))


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
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], hopper: str, ampere: str
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr("model.attention.missing", missing.__wrapped__)
    for capability, expected in (((9, 0), hopper), ((8, 0), ampere)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert resolve_backend(Attention.auto, CUDA, torch.bfloat16, equal=False).value == expected
    for name in {"flash_attn", "flash_attn_4"} - {hopper, ampere}:
        with pytest.raises(ModelError, match=rf"model\.attention \({name}\) .* pip (un)?install"):
            resolve_backend(Attention(name), CUDA, torch.bfloat16, equal=False)


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
