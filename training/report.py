"""Metrics of steps and validations, for loggers and the log."""

import logging
import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from parallel.engine import StepResult
from parallel.peers import SharedBuffer
from tracking.loggers import Loggers
from training.state import TrainState

logger = logging.getLogger(__name__)

# Dense bf16 or fp16 peak of a device in TFLOP/s, by a part of its name (NVIDIA's data sheets)
PEAK_TFLOPS = {
    "A100": 312, "A800": 312, "H100 PCIe": 756, "H100": 989, "H800": 989, "H200": 989, "GH200": 989,
    "B200": 2250, "L40S": 362, "L4": 121, "A10": 125, "V100": 125, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


def peak_tflops(device: torch.device) -> float | None:
    """Return a device's peak, or None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return PEAK_TFLOPS.get(max((part for part in PEAK_TFLOPS if part in name), key=len, default=""))


def loss_metrics(totals: Sequence[Sequence[float]], sources: Sequence[str], prefix: str) -> dict[str, float]:
    """Return loss, perplexity, accuracy and bits per byte, over all sources and per source.

    `totals` has a row per source: the sums of nll (nats), correct predictions, targets, and their bytes. A source
    without targets has no metrics.
    """
    metrics: dict[str, float] = {}
    overall = [sum(column) for column in zip(*totals, strict=True)]
    for name, (nll, correct, targets, n_bytes) in [("", overall), *zip(sources, totals, strict=True)]:
        if not targets:
            continue
        end, loss = f"/{name}" if name else "", nll / targets
        metrics[f"{prefix}/loss{end}"] = loss
        metrics[f"{prefix}/perplexity{end}"] = math.exp(min(loss, 700.0))
        metrics[f"{prefix}/accuracy{end}"] = correct / targets
        if n_bytes:
            metrics[f"{prefix}/bits_per_byte{end}"] = nll / math.log(2) / n_bytes
        metrics[f"{prefix}/targets{end}"] = targets
    return metrics


class Throughput:
    """Speed of training steps, including data loading.

    The host runs ahead of the device between logged steps, so metrics are means over the steps since the last
    call. Tokens include padding and masked tokens, per device, as InternLM's `tgs`; FLOP/s use InternLM's formula,
    and MFU the exact causal count.
    """

    def __init__(self, *, world_size: int, internlm_flops: float, causal_flops: float, peak: float | None) -> None:
        self.world_size, self.peak = world_size, peak
        self.internlm_flops, self.causal_flops = internlm_flops, causal_flops
        self.all_tokens, self.all_seconds, self.all_steps = 0, 0.0, 0
        self.tokens, self.seconds, self.waited, self.steps = 0, 0.0, 0.0, 0

    def begin(self) -> None:
        self.at = time.perf_counter()

    def data_ready(self) -> float:
        """Mark the arrival of the batch; return the seconds that the step waited for it."""
        elapsed = self.lap()
        self.waited += elapsed
        return elapsed

    def end(self, tokens: int) -> None:
        """Mark the end of a step on the host."""
        self.lap()
        self.tokens += tokens
        self.steps += 1

    def lap(self) -> float:
        """Add the time since the last mark; return it."""
        now = time.perf_counter()
        elapsed, self.at = now - self.at, now
        self.seconds += elapsed
        return elapsed

    def metrics(self, steps_left: int) -> dict[str, float | None]:
        """Return means since the last call, and the remaining time."""
        self.all_tokens += self.tokens
        self.all_seconds += self.seconds
        self.all_steps += self.steps
        tgs = self.tokens / self.seconds / self.world_size
        metrics = {
            "perf/tgs": tgs,
            "perf/tgs_all": self.all_tokens / self.all_seconds / self.world_size,
            "perf/tflops": tgs * self.internlm_flops / 1e12,
            "perf/mfu": tgs * self.causal_flops / (self.peak * 1e12) if self.peak else None,
            "perf/step_s": self.seconds / self.steps,
            "perf/data_wait_s": self.waited / self.steps,
            "perf/memory_gib": memory_gib(),
            "perf/left_s": steps_left * self.all_seconds / self.all_steps,
        }
        self.tokens, self.seconds, self.waited, self.steps = 0, 0.0, 0.0, 0
        return metrics


def memory_gib() -> float:
    """Return the peak of allocated GPU memory, shared buffers included, or of the process's memory without a GPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return (torch.cuda.max_memory_allocated() + SharedBuffer.total_bytes) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def step_line(record: dict[str, Any], steps: int) -> str:
    """Return a step's record as one line of fixed width."""
    width, left = len(str(steps)), timedelta(seconds=round(record["perf/left_s"]))
    mfu, loss = record["perf/mfu"], record.get("train/loss")  # None if the batch has no targets
    return (
        f"step {record['step']:{width}d}/{steps} {100 * record['step'] // steps:3d}%  "
        f"loss {'      -' if loss is None else f'{loss:7.4f}'}  "
        f"grad {record['train/grad_norm']:8.3g}  lr {record['optim/lr']:8.2e}  "
        f"{record['perf/tgs']:8,.0f} tok/s/gpu  {record['perf/tflops']:7.2f} TFLOP/s  "
        f"mfu {'     -' if mfu is None else f'{mfu:6.1%}'}  mem {record['perf/memory_gib']:5.1f}GiB  left {left!s:>15}"
    )


def valid_lines(metrics: dict[str, float], sources: Sequence[str]) -> list[str]:
    """Return a line for all sources, and one per source if there are several."""
    lines = []
    for name in ("", *sources) if len(sources) > 1 else ("",):
        words = ("loss", "perplexity", "accuracy", "bits_per_byte")
        keys = {word: f"valid/{word}/{name}" if name else f"valid/{word}" for word in words}
        shown = [f"{word} {metrics[key]:.4f}" for word, key in keys.items() if key in metrics]
        if shown:
            lines.append(f"  valid {name or 'all':16} {'  '.join(shown)}")
    return lines


class StepReport:
    """Logs steps and validations of a run."""

    def __init__(self, loggers: Loggers, throughput: Throughput, *, sources: Sequence[str], steps: int) -> None:
        self.loggers, self.throughput, self.sources, self.steps = loggers, throughput, sources, steps
        self.more: dict[str, float] = {}  # additional metrics of the next record

    def step(self, state: TrainState, result: StepResult, *, epochs: Mapping[int, float], loss_scale: float) -> None:
        """Log a step; `epochs` is by source."""
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
            **self.more,
        }
        self.loggers.log(record)
        self.say(step_line(record, self.steps))

    def validation(self, state: TrainState, totals_S4: Tensor) -> None:
        """Log a validation and update the plot."""
        metrics = loss_metrics(totals_S4.tolist(), self.sources, "valid")
        state.valid_loss, state.validated_step = metrics.get("valid/loss"), state.step
        self.loggers.log({"step": state.step, "tokens": state.tokens, **metrics})
        for line in valid_lines(metrics, self.sources):
            self.say(line)
        self.loggers.plot()

    def say(self, line: str) -> None:
        """Log a line on rank 0."""
        if not self.loggers.rank:
            logger.info("%s", line)
