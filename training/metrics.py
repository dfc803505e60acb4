"""Figures of a step: losses by source, and how fast the machine works."""

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Sequence

import torch

# Dense bf16 peak of one device in TFLOP/s, by a part of its name (NVIDIA's data sheets); fp16 is the same
PEAK_TFLOPS = {
    "A100": 312, "A800": 312, "H100 PCIe": 756, "H100": 989, "H800": 989, "H200": 989, "GH200": 989,
    "B200": 2250, "L40S": 362, "L4": 121, "A10": 125, "V100": 125, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


def peak_tflops(device: torch.device) -> float | None:
    """Return a device's peak, or None if its name is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = [part for part in PEAK_TFLOPS if part in name]
    return PEAK_TFLOPS[max(found, key=len)] if found else None


def loss_metrics(totals: Sequence[Sequence[float]], sources: Sequence[str], prefix: str) -> dict[str, float]:
    """Return loss, perplexity, accuracy and bits per byte, over all sources and for each.

    `totals` has a row per source: sums of nll (nats), of correct guesses, of targets, and of their bytes.
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
    """Speed from the start of a step's data to the end of its update.

    The host runs ahead of the device between the steps whose figures are read, so the figures are means over the
    steps since the last ones. Tokens are a batch's, padding and masked ones included, per device of the world, as
    InternLM's `tgs`; FLOP/s by its formula and, for MFU, by the exact causal count.
    """

    def __init__(self, *, world_size: int, internlm_flops: float, causal_flops: float, peak: float | None) -> None:
        self.world_size, self.peak = world_size, peak
        self.internlm_flops, self.causal_flops = internlm_flops, causal_flops
        self.recent: deque[tuple[int, float, int]] = deque(maxlen=50)  # tokens, seconds, steps of an interval
        self.all_tokens, self.all_seconds = 0, 0.0
        self._begin_interval()

    def _begin_interval(self) -> None:
        self.tokens, self.seconds, self.waited, self.steps = 0, 0.0, 0.0, 0

    def begin(self) -> None:
        self.at = time.perf_counter()

    def data_ready(self) -> None:
        """Note that the step's batch is there: until now the step waited for data."""
        self.waited += self._lap()

    def end(self, tokens: int) -> None:
        """Note that a step was given to the device."""
        self._lap()
        self.tokens += tokens
        self.steps += 1

    def device_done(self) -> None:
        """Note that the device has finished the last step: until now the host waited for it."""
        self._lap()

    def _lap(self) -> float:
        now = time.perf_counter()
        elapsed, self.at = now - self.at, now
        self.seconds += elapsed
        return elapsed

    def metrics(self, steps_left: int) -> dict[str, float | None]:
        """Return the means since the last call, and the time left at the mean of the last 50 intervals."""
        self.recent.append((self.tokens, self.seconds, self.steps))
        self.all_tokens += self.tokens
        self.all_seconds += self.seconds
        tgs = self.tokens / self.seconds / self.world_size
        step_s, data_wait_s = self.seconds / self.steps, self.waited / self.steps
        self._begin_interval()
        seconds, steps = (sum(interval[i] for interval in self.recent) for i in (1, 2))
        return {
            "perf/tgs": tgs,
            "perf/tgs_last_10": self._tgs_of_last(10),
            "perf/tgs_last_50": self._tgs_of_last(50),
            "perf/tgs_all": self.all_tokens / self.all_seconds / self.world_size,
            "perf/tflops": tgs * self.internlm_flops / 1e12,
            "perf/mfu": tgs * self.causal_flops / (self.peak * 1e12) if self.peak else None,
            "perf/step_s": step_s,
            "perf/data_wait_s": data_wait_s,
            "perf/memory_gib": memory_gib(),
            "perf/left_s": steps_left * seconds / steps,
        }

    def _tgs_of_last(self, n_steps: int) -> float:
        tokens, seconds = 0, 0.0
        for interval_tokens, interval_seconds, steps in reversed(self.recent):
            if n_steps <= 0:
                break
            tokens, seconds, n_steps = tokens + interval_tokens, seconds + interval_seconds, n_steps - steps
        return tokens / seconds / self.world_size


def memory_gib() -> float:
    """Return the peak of the device's allocated memory, or of this process's without a GPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
