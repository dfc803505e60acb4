"""How far a run has come: the one owner of its counters, on the host and on the device."""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from parallel.counters import StepCounters
from training.config import CheckpointError


@dataclass(slots=True)
class TrainState:
    """What a checkpoint keeps of a run beside its tensors."""

    step: int = 0  # batches taken from the data, trained on or not
    samples: int = 0  # packs taken from the data
    first_sample: int = 0  # where the data's order begins: not at 0 if files were added to it in the middle
    tokens: int = 0
    skipped_steps: int = 0  # by skip_batches
    validated_step: int = 0
    valid_loss: float | None = None
    evaluated: dict[str, int] = field(default_factory=dict)  # the last step of `evaluation` and of `samples`
    # Counted on the device, and here as of the last `sync`
    updates: int = 0  # of the weights; the schedule follows these
    nonfinite_steps: int = 0  # whose gradient was not finite
    nonfinite_in_a_row: int = 0
    spikes: int = 0
    recent: dict[str, list[float]] = field(default_factory=dict)  # figures of logged steps, for spikes
    device: torch.device = field(default=torch.device("cpu"), metadata={"saved": False})
    counters: StepCounters = field(init=False, metadata={"saved": False})

    def __post_init__(self) -> None:
        self.counters = StepCounters(self.device, (self.updates, self.nonfinite_steps, self.nonfinite_in_a_row))

    def take_batch(self, *, samples: int, tokens: int) -> None:
        """Count a batch taken from the data."""
        self.step += 1
        self.samples += samples
        self.tokens += tokens

    def sync(self) -> int:
        """Wait for the device and read its counters; return the new steps without a finite gradient."""
        before = self.nonfinite_steps
        self.updates, self.nonfinite_steps, self.nonfinite_in_a_row = self.counters.read()
        return self.nonfinite_steps - before

    def undone(self) -> tuple[str, ...]:
        """Return how the metrics begin that a run which resumes here may log again at this step."""
        last = {"valid/": self.validated_step, "evaluation": 0, "samples": 0} | self.evaluated
        return tuple(word for word, step in last.items() if step != self.step)

    def state_dict(self) -> dict[str, Any]:
        """Return the counters as JSON, which has no nan."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("saved", True)}
        values = deepcopy(values)  # a save in the background writes them later
        return {**values, "valid_loss": self.valid_loss if math.isfinite(self.valid_loss or 0) else None}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Take over the counters that are given, on the device too; call it before an engine counts."""
        if unknown := values.keys() - {f.name for f in fields(self)}:
            raise CheckpointError(f"its progress has {', '.join(sorted(unknown))}; use the version that wrote it")
        for name, value in values.items():
            setattr(self, name, value)
        self.__post_init__()
