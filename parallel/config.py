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


class RankError(Exception):
    """How one of several ranks failed: whole lines for the user, its traceback among them."""


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    device: Device = Device.auto
    local_processes: int | None = None  # ranks that `python train.py` starts here (null: one a GPU)
    threads: int | None = None  # CPU threads (null: all of this process's cores)
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    activation_checkpointing_fraction: float = 0.5

    def problems(self) -> Iterator[str]:
        if not 0 <= self.activation_checkpointing_fraction <= 1:
            yield (
                f"parallel.activation_checkpointing_fraction ({self.activation_checkpointing_fraction}) "
                "must be in [0, 1]"
            )
        if self.local_processes is not None and self.local_processes < 1:
            yield f"parallel.local_processes ({self.local_processes}) must be at least 1, or null for one a GPU"
        if self.threads is not None and self.threads < 1:
            yield f"parallel.threads ({self.threads}) must be at least 1, or null for all cores"
