"""The kernel for symmetric products against torch's products."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from training.config import OptimizerConfig
from training.optim import muon
from training.optim.optimizer import Optimizer

pytestmark = pytest.mark.gpu
DEVICE, DTYPE, ROUNDING = "cuda", torch.bfloat16, 4e-3
SHAPES = [(1, 1024, 1024), (3, 1024, 2048), (1, 2304, 768), (2, 1100, 333), (5, 129, 72), (1, 1, 8)]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("n", "m", "k"), SHAPES)
@pytest.mark.parametrize(
    ("rows", "columns", "warps", "tma"),
    [(128, 256, 8, True), (256, 128, 8, True), (128, 128, 8, True), (128, 128, 4, True), (128, 128, 8, False)],
)
def test_symmetric_products(n: int, m: int, k: int, rows: int, columns: int, warps: int, tma: bool) -> None:
    from training.optim.symmetric_kernel import Tiles, product

    tiles = Tiles(rows, columns, 64, warps=warps, stages=3, tma=tma)
    torch.manual_seed(0)
    x = torch.randn(n, k, m, device=DEVICE, dtype=DTYPE).mT / math.sqrt(k)  # not contiguous
    square = product(x, tiles=tiles)
    assert square.shape == (n, m, m) and square.dtype == DTYPE and torch.equal(square, square.mT)
    assert error(square, x.float() @ x.float().mT) < ROUNDING
    found, whole = product(square, beta=-4.775, alpha=2.0315, tiles=tiles), square.float()
    assert torch.equal(found, found.mT)
    assert error(found, torch.baddbmm(whole, whole, whole, beta=-4.775, alpha=2.0315)) < ROUNDING


def test_matrices_of_a_batch_do_not_touch() -> None:
    from training.optim.symmetric_kernel import product

    x = torch.randn(3, 1000, 1024, device=DEVICE, dtype=DTYPE)
    alone = product(x[:1].clone())
    x[1:] = math.nan
    assert torch.equal(product(x)[:1], alone)


def test_a_step_equals_one_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shapes = [(1024, 1024), (1024, 1024), (1280, 2048), (2048, 1280), (64, 96)]
    layers = {f"w{i}": nn.Linear(k, m, bias=False, device=DEVICE) for i, (m, k) in enumerate(shapes)}
    start = nn.ModuleDict({"blocks": nn.ModuleDict(layers)})
    grads, changes, used = [torch.randn_like(p) for p in start.parameters()], [], []
    takes_kernel = muon.takes_kernel
    monkeypatch.setattr(muon, "KERNEL_ELEMENTS", 1_000_000)
    for allowed in (True, False):
        monkeypatch.setattr(muon, "takes_kernel", lambda x, a=allowed: used.append(a and takes_kernel(x)) or used[-1])
        model = copy.deepcopy(start)
        optimizer = Optimizer(model, OptimizerConfig(name="muon", weight_decay=0.0))
        optimizer.set_schedule([(1e-2, 0.95)])
        for param, grad in zip(model.parameters(), grads, strict=True):
            param.grad = grad.clone()
        one = torch.ones((), device=DEVICE)
        optimizer.step(grad_scale=one, finite=one.bool())
        changes.append([p.detach() - q.detach() for p, q in zip(model.parameters(), start.parameters(), strict=True)])
    assert sum(used) == 3 * len(muon.NEWTON_SCHULZ)  # of three large shapes, and not of the small one
    for ours, plain in zip(*changes, strict=True):
        assert error(ours, plain) < 2e-2
