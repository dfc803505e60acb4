"""Step counters on the device, so that counting does not synchronize."""

from collections.abc import Sequence

import torch
from torch import Tensor


class StepCounters:
    """Counts updates, nonfinite steps, and consecutive nonfinite steps up to now."""

    def __init__(self, device: torch.device, counts: Sequence[int] = (0, 0, 0)) -> None:
        self.counts_3 = torch.tensor(counts, dtype=torch.int64).to(device)

    def add(self, finite: Tensor) -> None:
        """Count a step; `finite` is a bool scalar on the device."""
        updates, nonfinite_steps, nonfinite_in_a_row = self.counts_3.unbind()
        in_a_row = torch.where(finite, 0, nonfinite_in_a_row + 1)
        self.counts_3.copy_(torch.stack([updates + finite, nonfinite_steps + ~finite, in_a_row]))

    def read(self) -> tuple[int, int, int]:
        """Synchronize; return (updates, nonfinite_steps, nonfinite_in_a_row)."""
        updates, nonfinite_steps, nonfinite_in_a_row = self.counts_3.tolist()
        return updates, nonfinite_steps, nonfinite_in_a_row
