"""The chunked loss against F.cross_entropy."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.loss import linear_cross_entropy

N, D, V = 29, 16, 37


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::5] = -100
    return h, weight, labels, torch.rand(N, generator=generator)


@pytest.mark.parametrize("chunk_tokens", [1, 7, N, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_and_gradients_equal_cross_entropys(chunk_tokens: int, smoothing: float) -> None:
    h, weight, labels, loss_weights = inputs()
    logits = h @ weight.T
    expected = (loss_weights * F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)).sum() * 3
    grads = torch.autograd.grad(expected, (h, weight))
    loss, nll, correct = linear_cross_entropy(
        h, weight, labels, loss_weights, chunk_tokens=chunk_tokens, label_smoothing=smoothing
    )
    torch.testing.assert_close(loss * 3, expected)
    for mine, other in zip(torch.autograd.grad(loss * 3, (h, weight)), grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(nll, F.cross_entropy(logits, labels, reduction="none").detach())
    assert torch.equal(correct, (logits.argmax(-1) == labels))


def test_a_batch_without_targets_has_no_loss_and_no_nan() -> None:
    h, weight, labels, loss_weights = inputs()
    loss, nll, correct = linear_cross_entropy(h, weight, torch.full_like(labels, -100), loss_weights, chunk_tokens=8)
    loss.backward()
    assert h.grad is not None and weight.grad is not None
    assert (
        float(loss.detach()) == 0 and not h.grad.any() and not weight.grad.any() and not nll.any() and not correct.any()
    )


def test_without_gradients_the_numbers_are_the_same() -> None:
    h, weight, labels, loss_weights = inputs()
    with_grad = linear_cross_entropy(h, weight, labels, loss_weights, chunk_tokens=8)
    with torch.no_grad():
        without = linear_cross_entropy(h, weight, labels, loss_weights, chunk_tokens=8)
    assert not without[0].requires_grad
    assert all(torch.equal(a.detach(), b) for a, b in zip(with_grad, without, strict=True))


def test_bf16_is_close_to_fp32() -> None:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        h, weight, labels, loss_weights = inputs(torch.bfloat16)
        h, weight = (x.detach().to(dtype).requires_grad_() for x in (h, weight))
        loss = linear_cross_entropy(h, weight, labels, loss_weights, chunk_tokens=8)[0]
        loss.backward()
        results.append((loss.detach(), h.grad, weight.grad))
    for full, low in zip(*results, strict=True):
        assert full is not None and low is not None
        torch.testing.assert_close(low.float(), full, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_the_cpu(dtype: torch.dtype) -> None:
    results = []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        h, weight, labels, loss_weights = inputs(dtype)
        h, weight = (x.detach().to(device, kind).requires_grad_() for x in (h, weight))
        loss, nll, _ = linear_cross_entropy(h, weight, labels.to(device), loss_weights.to(device), chunk_tokens=8)
        loss.backward()
        results.append((loss.detach(), nll, h.grad, weight.grad))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda.float().cpu(), cpu, rtol=tolerance, atol=tolerance)
