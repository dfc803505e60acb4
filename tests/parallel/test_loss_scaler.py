"""The loss scaler against InternLM's settings and torch's own scaler."""

import pytest
import torch

from parallel.engine import LossScaler
from training.config import Dtype, PrecisionConfig


def scales(scaler: LossScaler, steps: list[bool]) -> list[float]:
    result = []
    for finite in steps:
        scaler.update(finite=finite)
        result.append(scaler.scale)
    return result


def fp16(**settings: float) -> LossScaler:
    return LossScaler(PrecisionConfig(compute=Dtype.fp16, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "steps", "last"),
    [
        ({}, [False] * 4, [65536, 65536, 32768, 16384]),  # halved from the third overflow
        ({}, [False, False] + [True] * 1000 + [False] * 3, [65536, 131072, 131072, 131072, 65536]),  # counted anew
        ({"growth_interval": 3}, [True, True, False, True, True, True], [65536, 65536, 131072]),  # restarted
        ({"initial_scale": 2, "hysteresis": 1, "min_scale": 1}, [False] * 5, [1, 1, 1]),
        ({"initial_scale": 2.0**23, "growth_interval": 1}, [True] * 5, [2.0**24] * 5),
    ],
)
def test_scale_falls_and_grows_within_bounds(settings: dict, steps: list[bool], last: list[float]) -> None:
    assert scales(fp16(**settings), steps)[-len(last) :] == last


def test_equals_torch_without_hysteresis() -> None:
    ours = fp16(growth_interval=2, initial_scale=1024)
    ours.overflows = ours.config.hysteresis
    theirs, tracker = torch.tensor([1024.0]), torch.zeros(1, dtype=torch.int32)
    for finite in [True, True, False, False, True, False, True]:
        torch._amp_update_scale_(  # type: ignore[attr-defined]
            theirs, tracker, torch.tensor([float(not finite)]), 2.0, 0.5, 2
        )
        ours.update(finite=finite)
        if finite:
            ours.overflows = ours.config.hysteresis
        assert ours.scale == float(theirs)


def test_state_dict_round_trip() -> None:
    first = fp16(growth_interval=3)
    scales(first, [False, False, False, True, True])
    second = fp16(growth_interval=3)
    second.load_state_dict(first.state_dict())
    steps = [True, False, True, True, True]
    assert scales(first, steps) == scales(second, steps)
