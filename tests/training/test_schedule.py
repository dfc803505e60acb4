"""Schedules against the published values and closed forms."""

import math

import pytest
import torch

from training.config import OptimizerConfig, SchedulerConfig, ScheduleType
from training.schedules import learning_rate, second_beta


def rate(update: int, steps: int = 50000, lr: float = 1e-4, **config: object) -> float:
    return learning_rate(update, steps=steps, lr=lr, config=SchedulerConfig(**config))  # type: ignore[arg-type]


INTERNLM = {
    0: 2e-7, 1: 4e-7, 249: 5e-5, 499: 1e-4, 500: 1e-4, 501: 9.999999990937e-5, 25250: 5.5e-5, 50000: 1e-5, 60000: 1e-5,
}  # fmt: skip


def test_cosine_has_internlms_values() -> None:
    assert {update: rate(update) for update in INTERNLM} == pytest.approx(INTERNLM, rel=1e-12)


def test_cosine_equals_torch_after_the_warm_up() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1e-4)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=1e-5)
    for update in range(10, 100):
        assert rate(update, steps=100, warmup_ratio=0.1) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize(
    ("warmup_ratio", "init_steps", "rates"),
    [(0.0, 3, [0, 0, 0, 1e-4]), (0.04, 2, [0, 0, 2.5e-5, 5e-5, 7.5e-5, 1e-4, 1e-4])],
)
def test_warm_up_follows_the_initial_steps(warmup_ratio: float, init_steps: int, rates: list[float]) -> None:
    found = [rate(u, steps=100, warmup_ratio=warmup_ratio, init_steps=init_steps) for u in range(len(rates))]
    assert found == pytest.approx(rates)


def test_wsd_is_flat_then_linear() -> None:
    rates = [rate(u, steps=100, type=ScheduleType.wsd, warmup_ratio=0.1, decay_ratio=0.2) for u in range(101)]
    assert rates[10:81] == pytest.approx([1e-4] * 71)
    assert rates[90] == pytest.approx((1e-4 + 1e-5) / 2)
    assert rates[100] == pytest.approx(1e-5)


def test_beta2_has_internlms_values() -> None:
    config = OptimizerConfig(beta2=0.95, beta2_c=0.8)
    values = [second_beta(i, config) for i in (0, 42, 43, 1000)]
    assert values == pytest.approx([0.95, 0.95, 0.95066, 0.99602], abs=5e-6)
    assert second_beta(43, config) == 1 - math.pow(43, -0.8)
    assert {second_beta(i, OptimizerConfig()) for i in (0, 10, 10**6)} == {0.95}
