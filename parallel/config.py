"""How a model is laid out on devices. Free of torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class Device(Enum):
    auto = "auto"  # cuda when there is one
    cpu = "cpu"
    cuda = "cuda"


class ActivationCheckpointing(Enum):
    none = "none"
    full = "full"  # keep only the input of each block, compute it again in the backward pass
    fraction = "fraction"  # do so for the first `activation_checkpointing_fraction` of the blocks


class ParallelError(Exception):
    """A layout that this machine cannot run, told as a sentence for the user."""


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    device: Device = Device.auto
    threads: int | None = None  # CPU threads (null: all of this process's cores)
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    activation_checkpointing_fraction: float = 0.5

    def problems(self) -> Iterator[str]:
        if not 0 <= self.activation_checkpointing_fraction <= 1:
            yield (
                f"parallel.activation_checkpointing_fraction ({self.activation_checkpointing_fraction}) "
                "must be in [0, 1]"
            )
        if self.threads is not None and self.threads < 1:
            yield f"parallel.threads ({self.threads}) must be at least 1, or null for all cores"
