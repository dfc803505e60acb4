"""What a run logs, and when a sweep gives a run up. Torch-free."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class LoggerConfig:
    """metrics.jsonl, the console and loss.png are always written."""

    every: int = 1  # steps between console lines and records
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "pretraining"
    peak_tflops: float | None = None  # of one device, for MFU (null: from its name, if known)

    def problems(self) -> Iterator[str]:
        if self.every < 1:
            yield f"logger.every ({self.every}) must be at least 1"
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            yield f"logger.peak_tflops ({self.peak_tflops}) must be positive, or null"


@dataclass(kw_only=True, slots=True)
class EarlyStopConfig:
    """Gives up a point of a sweep whose smoothed loss is above the best point's at the same tokens by a margin."""

    margin: float | None = None  # nats a token (null: no point is given up)
    after_step: int = 100
    every: int = 10  # steps between comparisons

    def problems(self) -> Iterator[str]:
        if self.margin is not None and not self.margin > 0:
            yield f"early_stop.margin ({self.margin}) must be positive, or null for no early stop"
        for key in ("after_step", "every"):
            if getattr(self, key) < 1:
                yield f"early_stop.{key} ({getattr(self, key)}) must be at least 1"
