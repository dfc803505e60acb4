"""The chunked loss against F.cross_entropy, and its Triton kernels against the passes in torch."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.loss import Factors, _TorchPasses, linear_cross_entropy

N, D, V = 29, 16, 37
EXTRAS = [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.1, 1e-2)]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::5] = -100
    return h, weight, labels, torch.rand(N, generator=generator)


@pytest.mark.parametrize("chunk_tokens", [1, 7, N, 1000])
@pytest.mark.parametrize(("smoothing", "z_loss"), EXTRAS)
def test_value_and_gradients_equal_cross_entropy(chunk_tokens: int, smoothing: float, z_loss: float) -> None:
    h, weight, labels, loss_weights = inputs()
    logits = h @ weight.T
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    expected = 3 * (loss_weights * (losses + z_loss * logits.logsumexp(-1).square() * (labels != -100))).sum()
    grads = torch.autograd.grad(expected, (h, weight))
    how = {"chunk_tokens": chunk_tokens, "label_smoothing": smoothing, "z_loss": z_loss}
    loss, nll, correct = linear_cross_entropy(h, weight, labels, loss_weights, **how)
    torch.testing.assert_close(loss * 3, expected)
    for mine, other in zip(torch.autograd.grad(loss * 3, (h, weight)), grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(nll, F.cross_entropy(h @ weight.T, labels, reduction="none").detach())
    assert torch.equal(correct, (h @ weight.T).argmax(-1) == labels)
    with torch.no_grad():
        same = linear_cross_entropy(h, weight, labels, loss_weights, **how)
    assert not same[0].requires_grad
    assert all(torch.equal(a.detach(), b) for a, b in zip((loss, nll, correct), same, strict=True))


def test_batch_without_targets_has_zero_loss_and_gradients() -> None:
    h, weight, labels, loss_weights = inputs()
    loss, nll, correct = linear_cross_entropy(h, weight, torch.full_like(labels, -100), loss_weights, chunk_tokens=8)
    grads = torch.autograd.grad(loss, (h, weight))
    assert not any(x.any() for x in (loss, nll, correct, *grads))


class Piece:
    """A shard of the vocabulary; the others are threads, which meet at a barrier and read each other's tensors."""

    def __init__(self, first: int, place: int, board: list[Tensor], meet: Barrier) -> None:
        self.first, self.n_vocab, self.place, self.board, self.meet = first, V, place, board, meet

    def _all(self, tensor: Tensor) -> Tensor:
        self.board[self.place] = tensor.clone()
        self.meet.wait(60)
        everything = torch.stack(self.board)
        self.meet.wait(60)
        return everything

    def max_(self, tensor: Tensor) -> None:
        tensor.copy_(self._all(tensor).amax(0))

    def sum_(self, tensor: Tensor) -> None:
        tensor.copy_(self._all(tensor).sum(0))


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 1e-2)])
def test_sharded_vocabulary_equals_the_whole(smoothing: float, z_loss: float) -> None:
    h, weight, labels, loss_weights = inputs()
    weight.data[30] = weight.data[2]  # a tie between two parts: the first of equals is the guess
    labels[1], labels[2] = 2, 30
    whole = linear_cross_entropy(
        h, weight, labels, loss_weights, chunk_tokens=8, label_smoothing=smoothing, z_loss=z_loss
    )
    grads = torch.autograd.grad(whole[0], (h, weight))
    bounds, board, meet = [(0, 10), (10, 11), (11, V)], [torch.empty(0)] * 3, Barrier(3)

    def part(place: int) -> tuple[Tensor, ...]:
        first, end = bounds[place]
        mine, rows = h.detach().requires_grad_(), weight.detach()[first:end].requires_grad_()
        found = linear_cross_entropy(
            mine, rows, labels, loss_weights,
            chunk_tokens=8, label_smoothing=smoothing, z_loss=z_loss, shard=Piece(first, place, board, meet),
        )  # fmt: skip
        return (*(x.detach() for x in found), *torch.autograd.grad(found[0], (mine, rows)))

    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(part, range(3)))
    for loss, nll, correct, _, _ in parts:
        torch.testing.assert_close(loss, whole[0].detach())
        torch.testing.assert_close(nll, whole[1])
        assert torch.equal(correct, whole[2])
    torch.testing.assert_close(sum(p[3] for p in parts), grads[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([p[4] for p in parts]), grads[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("place", "dtype"),
    [
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("chunk_tokens", [8, N])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 1e-2)])
def test_device_and_dtype(place: str, dtype: torch.dtype, chunk_tokens: int, smoothing: float, z_loss: float) -> None:
    results = []
    for device, kind in (("cpu", torch.float32), (place, dtype)):
        h, weight, labels, loss_weights = inputs(dtype)
        h, weight = (x.detach().to(device, kind).requires_grad_() for x in (h, weight))
        loss, nll, _ = linear_cross_entropy(
            h, weight, labels.to(device), loss_weights.to(device),
            chunk_tokens=chunk_tokens, label_smoothing=smoothing, z_loss=z_loss,
        )  # fmt: skip
        loss.backward()
        results.append((loss.detach(), nll, h.grad, weight.grad))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for exact, found in zip(*results, strict=True):
        torch.testing.assert_close(found.float().cpu(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_kernels_equal_the_passes_in_torch() -> None:
    from model import loss_kernel

    logits = torch.randn(64, 10_007, device="cuda") * 4
    logits[:, 9000] = logits[:, 17] = 40.0  # equal maxima
    labels = torch.randint(-10_007, 20_000, (64,), device="cuda")
    factors = Factors(*torch.rand(3, 64, device="cuda"))
    ours, theirs = logits.clone(), logits.clone()
    found, expected = loss_kernel.statistics(ours, labels), _TorchPasses.statistics(theirs, labels)
    assert torch.equal(found.argmax, torch.full_like(found.argmax, 17))
    for name in ("row_max", "sum_exp", "target", "total"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-3)
    log_norm = expected.row_max + expected.sum_exp.log()
    a = loss_kernel.gradient(ours, labels, found.row_max, log_norm, factors)
    b = _TorchPasses.gradient(theirs, labels, expected.row_max, log_norm, factors)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_scales_and_rounds_as_torch(dtype: torch.dtype) -> None:
    from model import loss_kernel

    x, factor = torch.randn(333, 77, device="cuda"), torch.tensor(0.3, device="cuda")
    for given in (x, x.to(dtype)):
        assert torch.equal(loss_kernel.scaled(given, factor, dtype), (given.float() * factor).to(dtype))
