"""What a step is told as: losses by source, and how fast the machine worked."""

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

# Dense bf16 peak of one device in TFLOP/s, by a part of its name (NVIDIA's data sheets); fp16 is the same
PEAK_TFLOPS = {
    "A100": 312, "A800": 312, "H100 PCIe": 756, "H100": 989, "H800": 989, "H200": 989, "GH200": 989,
    "B200": 2250, "L40S": 362, "L4": 121, "A10": 125, "V100": 125, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


def peak_tflops(device: torch.device) -> float | None:
    """Give a device's peak, or None if its name is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = [part for part in PEAK_TFLOPS if part in name]
    return PEAK_TFLOPS[max(found, key=len)] if found else None


def loss_metrics(totals: Sequence[Sequence[float]], sources: Sequence[str], prefix: str) -> dict[str, float]:
    """Give loss, perplexity, accuracy and bits per byte, over all and for each source.

    `totals` has a row a source: sums of nll (nats), of correct guesses, of targets, and of their bytes.
    A source without targets has no metrics.
    """
    metrics: dict[str, float] = {}
    overall = [sum(column) for column in zip(*totals, strict=True)]
    for name, (nll, correct, targets, n_bytes) in [("", overall), *zip(sources, totals, strict=True)]:
        if not targets:
            continue
        end = f"/{name}" if name else ""
        loss = nll / targets
        metrics[f"{prefix}/loss{end}"] = loss
        metrics[f"{prefix}/perplexity{end}"] = math.exp(min(loss, 700.0))
        metrics[f"{prefix}/accuracy{end}"] = correct / targets
        if n_bytes:
            metrics[f"{prefix}/bits_per_byte{end}"] = nll / math.log(2) / n_bytes
        metrics[f"{prefix}/targets{end}"] = targets
    return metrics


class Throughput:
    """Speed by the build_throughput, from the start of a step's data to the end of its update.

    The host runs ahead of the device between the steps whose figures are read: these are the mean of the
    steps since the last ones.
    Tokens are a batch's, padding and masked ones included, and per device of the world, as
    InternLM's `tgs`; FLOP/s by its formula and, for MFU, by the exact causal count.
    """

    def __init__(self, *, world_size: int, internlm_flops: float, causal_flops: float, peak: float | None) -> None:
        self.world_size, self.peak = world_size, peak
        self.internlm_flops, self.causal_flops = internlm_flops, causal_flops
        self.recent: deque[tuple[int, float, int]] = deque(maxlen=50)  # tokens, seconds, steps
        self.tokens, self.seconds = 0, 0.0
        self.unread, self.waited = (0, 0.0, 0), 0.0
        self.begin()

    def begin(self) -> None:
        self.started = time.perf_counter()

    def data_ready(self) -> None:
        """Note that the step's batch is there: until now the step waited for data."""
        self.waited += time.perf_counter() - self.started

    def end(self, tokens: int) -> None:
        """Note that a step is done, or that it was given to the device if its figures are not read."""
        elapsed = time.perf_counter() - self.started
        so_far, seconds, steps = self.unread
        self.unread = so_far + tokens, seconds + elapsed, steps + 1
        self.tokens += tokens
        self.seconds += elapsed

    def metrics(self, steps_left: int) -> dict[str, float | None]:
        """Give the figures since the last time, a step, and the time left at the mean of the last 50 times."""
        self.recent.append(self.unread)
        tokens, seconds, n_steps = self.unread
        waited = self.waited / n_steps
        self.unread, self.waited = (0, 0.0, 0), 0.0
        tgs = tokens / seconds / self.world_size
        mfu = tgs * self.causal_flops / (self.peak * 1e12) if self.peak else None

        def mean(last: int) -> float:
            taken, found = 0, []
            for interval in reversed(self.recent):
                if taken >= last:
                    break
                found.append(interval)
                taken += interval[2]
            return sum(t for t, _, _ in found) / sum(s for _, s, _ in found) / self.world_size

        step_seconds = sum(s for _, s, _ in self.recent) / sum(n for _, _, n in self.recent)
        return {
            "perf/tgs": tgs,
            "perf/tgs_last_10": mean(10),
            "perf/tgs_last_50": mean(50),
            "perf/tgs_all": self.tokens / self.seconds / self.world_size,
            "perf/tflops": tgs * self.internlm_flops / 1e12,
            "perf/mfu": mfu,
            "perf/step_s": seconds / n_steps,
            "perf/data_wait_s": waited,
            "perf/memory_gib": memory_gib(),
            "perf/left_s": steps_left * step_seconds,
        }


def memory_gib() -> float:
    """Give the peak of the device's allocated memory, or of this process's without a GPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def duration(seconds: float) -> str:
    """Write a time as a person would: 42s, 12m05s, 3h07m, 2d04h."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{h}h{m:02d}m"
    return f"{m}m{s:02d}s" if minutes else f"{s}s"


def step_line(record: dict[str, Any], steps: int) -> str:
    """Write a step's record as one line of fixed width."""
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
    """Write a validation as a line over all sources and one for each, if there are several."""
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
