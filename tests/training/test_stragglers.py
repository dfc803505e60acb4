"""The rank that holds up the others is found by the time that each takes by itself."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from training.stragglers import IN_A_ROW, Stragglers


def test_ten_steps_of_one_slow_rank_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    mesh: Any = SimpleNamespace(rank=0, device=torch.device("cpu"))
    found = Stragglers(mesh)
    for slow in [1] * (IN_A_ROW - 1) + [2] * (IN_A_ROW + 5):
        assert len(caplog.records) == (slow == 2 and found.in_a_row >= IN_A_ROW)
        found.note([5.0 if rank == slow else 1.0 for rank in range(3)])
        found.note([0.0, 0.0, 0.0])  # of a validation
    assert [record.message for record in caplog.records] == [
        "rank 2 has slowed down the others for 10 steps: data and first forward take 5 s, others' 1 s"
    ]
    assert found.metrics == {"perf/slowest_rank": 2, "perf/slowest_rank_s": 5.0, "perf/own_s": 1.0}
    for _ in range(2 * IN_A_ROW):
        found.note([1.0, 1.05, 1.0])
    assert len(caplog.records) == 1, "no slower than usual"
