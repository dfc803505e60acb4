"""Every CUDA backend against the reference, forward and backward."""

import pytest
import torch

from model.attention import attend, installed, segments_of
from model.config import Attention

BACKENDS = [Attention.flash_attn_4, Attention.flash_attn, Attention.varlen, Attention.cudnn, Attention.sdpa]
PACKS = {"equal": [256] * 8, "uneven": [100, 412, 7, 505, 1024]}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pack", list(PACKS))
@pytest.mark.parametrize(("n_kv_heads", "head_dim"), [(8, 128), (2, 128), (2, 64)])
def test_a_backend_is_as_exact_as_bf16_allows(backend: Attention, pack: str, n_kv_heads: int, head_dim: int) -> None:
    if not installed(backend):
        pytest.skip(f"{backend.value} is not installed")
    lengths = PACKS[pack]
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(2, 1024, heads, head_dim, device="cuda", dtype=torch.bfloat16, generator=generator)

    inputs, grad = (draw(8), draw(n_kv_heads), draw(n_kv_heads)), draw(8)
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    results = {}
    for name, kind, dtype in (
        ("exact", Attention.reference, torch.float32),
        ("rounded", Attention.reference, torch.bfloat16),
        ("backend", backend, torch.bfloat16),
    ):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs)
        segments = segments_of(cu_seqlens, max(lengths), 2, 1024, kind)
        out = attend(q, k, v, segments=segments, backend=kind)
        results[name] = (out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(dtype)))
    for exact, rounded, found in zip(results["exact"], results["rounded"], results["backend"], strict=True):
        allowed = 3 * (rounded.float() - exact).abs().max() + 1e-3
        assert (found.float() - exact).abs().max() <= allowed
