"""What a run reports of its steps: records to the loggers, lines to the log."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from parallel.engine import StepResult
from tracking.loggers import Loggers
from training.metrics import Throughput, loss_metrics
from training.state import TrainState

logger = logging.getLogger(__name__)


class StepReport:
    """Reports a run's steps and validations, with the speed that its `throughput` measures."""

    def __init__(self, loggers: Loggers, throughput: Throughput, *, sources: Sequence[str], steps: int) -> None:
        self.loggers, self.throughput, self.sources, self.steps = loggers, throughput, sources, steps

    def step(self, state: TrainState, result: StepResult, *, epochs: Mapping[int, float], loss_scale: float) -> None:
        """Report a step; `epochs` is how often each source has been seen."""
        lr, beta2 = result.rates_2.tolist()
        record: dict[str, Any] = {
            "step": state.step,
            "tokens": state.tokens,
            **{f"epochs/{self.sources[source]}": value for source, value in epochs.items()},
            "train/objective": float(result.loss),
            **loss_metrics(result.totals_S4.tolist(), self.sources, "train"),
            **{f"train/{name}": float(value) for name, value in result.aux.items()},
            "train/grad_norm": float(result.grad_norm),
            "optim/lr": lr,
            "optim/beta2": beta2,
            "optim/loss_scale": loss_scale,
            "train/nonfinite_steps": state.nonfinite_steps,
            **self.throughput.metrics(self.steps - state.step),
        }
        self.loggers.log(record)
        logger.info("%s", step_line(record, self.steps))

    def validation(self, state: TrainState, totals_S4: Tensor) -> None:
        """Report a validation, by source, and draw the curve."""
        metrics = loss_metrics(totals_S4.tolist(), self.sources, "valid")
        state.valid_loss, state.validated_step = metrics.get("valid/loss"), state.step
        self.loggers.log({"step": state.step, "tokens": state.tokens, **metrics})
        for line in valid_lines(metrics, self.sources):
            logger.info("%s", line)
        self.loggers.plot()


def step_line(record: dict[str, Any], steps: int) -> str:
    """Return a step's record as one line of fixed width."""
    width = len(str(steps))
    mfu = record["perf/mfu"]
    return (
        f"step {record['step']:{width}d}/{steps}  loss {record.get('train/loss', math.nan):7.4f}  "
        f"grad {record['train/grad_norm']:8.3g}  lr {record['optim/lr']:8.2e}  "
        f"{record['perf/tgs']:8,.0f} tok/s/gpu  {record['perf/tflops']:7.2f} TFLOP/s  "
        f"mfu {f'{mfu:6.1%}' if mfu is not None else '     -'}  mem {record['perf/memory_gib']:5.1f}GiB  "
        f"left {duration(record['perf/left_s']):>6}"
    )


def valid_lines(metrics: dict[str, float], sources: Sequence[str]) -> list[str]:
    """Return a validation as a line over all sources, and one for each if there are several."""
    lines = []
    for name in ("", *sources) if len(sources) > 1 else ("",):
        end = f"/{name}" if name else ""
        if f"valid/loss{end}" not in metrics:
            continue
        bits = metrics.get(f"valid/bits_per_byte{end}")
        lines.append(
            f"  valid {name or 'all':16} loss {metrics[f'valid/loss{end}']:.4f}  "
            f"perplexity {metrics[f'valid/perplexity{end}']:.2f}  accuracy {metrics[f'valid/accuracy{end}']:.2%}"
            + (f"  bits/byte {bits:.4f}" if bits is not None else "")
        )
    return lines


def duration(seconds: float) -> str:
    """Return a time in two units: 42s, 12m05s, 3h07m, 2d04h."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    return f"{h}h{m:02d}m" if hours else f"{m}m{s:02d}s" if minutes else f"{s}s"
