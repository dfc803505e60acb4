"""Configuration of loggers, alerts and early stopping. Torch-free."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from launch.config import unless


@dataclass(kw_only=True, slots=True)
class LoggerConfig:
    """Loggers besides the console, metrics.jsonl and loss.png."""

    every: int = 1  # steps per record
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "pretraining"
    wandb_entity: str | None = None  # the team or user (null: your default)
    wandb_tags: list[str] = field(default_factory=list)
    wandb_notes: str | None = field(default=None, metadata={"prose": True})
    extra: list[str] = field(default_factory=list)  # custom loggers, module:Class; see tracking.loggers.Logger
    peak_tflops: float | None = None  # of one device, for MFU (null: from its name, if known)

    def problems(self) -> Iterator[str]:
        yield from unless(self, "logger", "at least 1", lambda x: x >= 1, "every")
        yield from unless(self, "logger", "positive, or null", lambda x: x > 0, "peak_tflops")


@dataclass(kw_only=True, slots=True)
class AlertsConfig:
    """Receivers of alerts on crash, requeue, stop, spike, stall and end: JSON of run, state, step and reason."""

    command: str | None = field(default=None, metadata={"prose": True})  # shell command that reads it on stdin
    webhook: str | None = field(default=None, metadata={"prose": True})  # URL to POST it to

    def problems(self) -> Iterator[str]:
        if self.webhook is not None and not self.webhook.startswith(("http://", "https://")):
            yield f"alerts.webhook ({self.webhook}) must begin with http:// or https://"


@dataclass(kw_only=True, slots=True)
class EarlyStopConfig:
    """Stop a point of a sweep whose metric is worse than the best point's at the same tokens by a margin."""

    margin: float | None = None  # nats per token for a loss (null: no early stop)
    metric: str = "train/loss"  # training metrics are smoothed; -metric: higher is better
    after_step: int = 100
    every: int = 10  # steps between comparisons

    def problems(self) -> Iterator[str]:
        yield from unless(self, "early_stop", "positive, or null for no early stop", lambda x: x > 0, "margin")
        yield from unless(self, "early_stop", "at least 1", lambda x: x >= 1, "after_step", "every")
