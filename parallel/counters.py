"""Counters of a run's steps that stay on the device, so that a step does not wait for the host."""

from collections.abc import Sequence

import torch
from torch import Tensor


class StepCounters:
    """Updates made, steps without a finite gradient, and how many of these were the last ones: int64 (3,)."""

    def __init__(self, device: torch.device, values: Sequence[int] = (0, 0, 0)) -> None:
        self.tensor = torch.tensor(values, dtype=torch.int64).to(device)

    def add(self, finite: Tensor) -> None:
        """Count a step, without waiting for it; `finite` is a boolean scalar on the device."""
        updates, nonfinite_steps, nonfinite_in_a_row = self.tensor.unbind()
        in_a_row = torch.where(finite, 0, nonfinite_in_a_row + 1)
        self.tensor.copy_(torch.stack([updates + finite, nonfinite_steps + ~finite, in_a_row]))

    def read(self) -> tuple[int, int, int]:
        """Wait for all steps; return updates, steps without a finite gradient, and how many of them came last."""
        updates, nonfinite_steps, nonfinite_in_a_row = self.tensor.tolist()
        return updates, nonfinite_steps, nonfinite_in_a_row
