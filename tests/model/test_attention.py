"""FlashAttention's functions are called as they are declared, and what is not installed is told in a sentence."""

import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import Tensor

from model import attention
from model.attention import attend, resolve_backend, segments_of
from model.config import Attention, ModelError

CUDA = torch.device("cuda")


def one_segment(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
    times = q_THK.shape[1] // k_TGK.shape[1]
    q, k, v = (x.float() for x in (q_THK, k_TGK.repeat_interleave(times, 1), v_TGK.repeat_interleave(times, 1)))
    scores = torch.einsum("thk,shk->hts", q, k) * q.shape[-1] ** -0.5
    future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("hts,shk->thk", scores.masked_fill(future, -torch.inf).softmax(-1), v).type_as(q_THK)


def check(dims: int, q: Tensor, k: Tensor, v: Tensor, others: dict[str, object]) -> None:
    """What the compiled functions check of their inputs, and that nothing else is asked of them."""
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
def test_flash_attention_2_is_given_what_makes_it_the_reference(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], n_kv_heads: int
) -> None:
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
        segments = segments_of(cu_seqlens, max(lengths), 2, 32, backend)
        out = attend(q, k, v, segments=segments, backend=backend)
        found.append((out, *torch.autograd.grad((out * grad).sum(), (q, k, v))))
    for exact, other in zip(*found, strict=True):
        torch.testing.assert_close(exact, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_4"])
def test_a_package_that_is_not_installed_is_told_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(attention, "installed", lambda backend: False)
    package = name.replace("_", "-")
    wanted = rf"model.attention \({name}\) is not installed: pip install -r requirements-gpu.txt \({package}\)"
    with pytest.raises(ModelError, match=wanted):
        resolve_backend(Attention(name), CUDA, torch.bfloat16, equal=False)


def test_flash_attention_2_is_taken_where_4_is_not_installed_or_not_made_for_the_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def chosen(*installed: Attention, capability: tuple[int, int]) -> Attention:
        monkeypatch.setattr(attention, "installed", lambda backend: backend in installed)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return resolve_backend(Attention.auto, CUDA, torch.bfloat16, equal=False)

    both = (Attention.flash_attn, Attention.flash_attn_4)
    assert chosen(*both, capability=(9, 0)) is Attention.flash_attn_4
    assert chosen(*both, capability=(8, 0)) is Attention.flash_attn
    assert chosen(Attention.flash_attn, capability=(9, 0)) is Attention.flash_attn
    assert chosen(capability=(9, 0)) is Attention.varlen
