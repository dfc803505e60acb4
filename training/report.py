"""What a run tells of its steps: records to the sinks, lines to the log."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from tracking.loggers import Loggers
from training.metrics import Throughput, loss_metrics, step_line, valid_lines
from training.state import TrainState

logger = logging.getLogger(__name__)


class StepFigures(Protocol):
    """What is read of an engine's result."""

    loss: Tensor
    grad_norm: Tensor
    totals_S4: Tensor


class Report:
    """Writes a run's steps and validations down, with the clock of its `throughput`."""

    def __init__(self, sinks: Loggers, throughput: Throughput, *, sources: Sequence[str], steps: int) -> None:
        self.sinks, self.throughput, self.sources, self.steps = sinks, throughput, sources, steps

    def step(self, progress: TrainState, result: StepFigures, epochs: Mapping[int, float], **optim: float) -> None:
        """Write the record of a step and its line.

        `epochs` says how often each source has been seen, `optim` what the update was made with.
        """
        record: dict[str, Any] = {"step": progress.step, "tokens": progress.tokens}
        record |= {f"epochs/{self.sources[source]}": value for source, value in epochs.items()}
        record |= {
            "train/objective": float(result.loss),
            **loss_metrics(result.totals_S4.tolist(), self.sources, "train"),
        }
        record |= {
            "train/grad_norm": float(result.grad_norm),
            **{f"optim/{key}": value for key, value in optim.items()},
        }
        record |= {
            "train/nonfinite_steps": progress.nonfinite_steps,
            **self.throughput.metrics(self.steps - progress.step),
        }
        self.sinks.log(record)
        logger.info("%s", step_line(record, self.steps))

    def validation(self, progress: TrainState, totals_S4: Tensor) -> None:
        """Write a validation down, by source, and draw the curve."""
        metrics = loss_metrics(totals_S4.tolist(), self.sources, "valid")
        progress.valid_loss, progress.validated_step = metrics.get("valid/loss"), progress.step
        self.sinks.log({"step": progress.step, "tokens": progress.tokens, **metrics})
        for line in valid_lines(metrics, self.sources):
            logger.info("%s", line)
        self.sinks.plot()
