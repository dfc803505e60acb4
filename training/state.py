"""The progress of a run: all counters, on the host and on the device."""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import InitVar, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from training.config import CheckpointError


@dataclass(slots=True)
class TrainState:
    """The part of a run's state that is not tensors; saved in checkpoints."""

    step: int = 0  # batches taken from the data, including skipped ones
    samples: int = 0  # packs taken from the data
    first_sample: int = 0  # start of the current order of samples, which restarts when data is added
    tokens: int = 0
    skipped_steps: int = 0  # by skip_batches
    validated_step: int = 0
    valid_loss: float | None = None
    evaluated: dict[str, int] = field(default_factory=dict)  # last step of `evaluation` and of `samples`
    # Counted on the device; here as of the last `sync`
    updates: int = 0  # of the weights, which index the schedule
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    spikes: int = 0
    recent: dict[str, list[float]] = field(default_factory=dict)  # figures of logged steps, for spikes
    device: InitVar[torch.device | str] = "cpu"
    counts_3: Tensor = field(init=False, metadata={"saved": False})  # the engine counts these three

    def __post_init__(self, device: torch.device | str) -> None:
        self.counts_3 = torch.zeros(3, dtype=torch.int64, device=device)

    def take_batch(self, *, samples: int, tokens: int) -> None:
        """Count a batch taken from the data."""
        self.step += 1
        self.samples += samples
        self.tokens += tokens

    def sync(self) -> int:
        """Wait for the device and read its counters; return the new steps without a finite gradient."""
        before = self.nonfinite_steps
        self.updates, self.nonfinite_steps, self.nonfinite_in_a_row = self.counts_3.tolist()
        return self.nonfinite_steps - before

    def undone(self) -> tuple[str, ...]:
        """Return prefixes of metrics that a run resumed here may log again at this step."""
        last = {"valid/": self.validated_step, "evaluation": 0, "samples": 0} | self.evaluated
        return tuple(word for word, step in last.items() if step != self.step)

    def state_dict(self) -> dict[str, Any]:
        """Return the counters as JSON; nan becomes None."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("saved", True)}
        values = deepcopy(values)  # a background save writes them later
        return {**values, "valid_loss": self.valid_loss if math.isfinite(self.valid_loss or 0) else None}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Set the given counters, on the device too."""
        if unknown := values.keys() - {f.name for f in fields(self)}:
            raise CheckpointError(f"unknown progress {', '.join(sorted(unknown))}; use the version that wrote it")
        for name, value in values.items():
            setattr(self, name, value)
        counts = [self.updates, self.nonfinite_steps, self.nonfinite_in_a_row]
        self.counts_3.copy_(torch.tensor(counts))
