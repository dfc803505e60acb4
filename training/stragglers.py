"""Which rank holds up the others: the time that each takes by itself in a step."""

import json
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from parallel.engine import Engine
from parallel.mesh import Mesh

SLOWER, SHARE = 1.1, 0.02  # than the median of the others, and by that share of the whole step
IN_A_ROW = 10

logger = logging.getLogger(__name__)


class Stragglers:
    """Compares the ranks' own times: to get a batch, and to run the first micro-batch forward.

    Neither waits for another rank, unless weights, sequences or layers are split over ranks. The device's time is read
    when it is there, steps later perhaps.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.data_s = self.forward_s = 0.0
        self.times: list[Any] = []  # of forward passes that the device has yet to make: start and end
        self.first_pass = self.measured = False
        self.noted_at = time.perf_counter()
        self.slowest, self.in_a_row = 0, 0
        self.metrics: dict[str, float] = {}

    @contextmanager
    def watch(self, engine: Engine) -> Iterator[None]:
        """Measure the forward passes of a model; not under a pipeline, where they wait for others, nor in a graph."""
        if self.mesh.world_size == 1 or self.mesh.axes.pp > 1 or engine.graphs is not None:
            yield
            return
        hooks = [engine.model.register_forward_pre_hook(self._start), engine.model.register_forward_hook(self._end)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def begin(self, data_s: float) -> None:
        """Begin a step, for whose batch this rank waited `data_s`."""
        self.data_s, self.first_pass, self.measured = data_s, True, True

    def own_s(self) -> float:
        """Return this rank's own time in the step just made; 0 if there is none to compare."""
        while self.times and self.times[0][1].query():
            start, end = self.times.pop(0)
            self.forward_s = start.elapsed_time(end) / 1e3
        measured, self.measured = self.measured, False
        return self.data_s + self.forward_s if measured else 0.0

    def note(self, own_s: Sequence[float]) -> None:
        """Take the times of all ranks, and warn if one has held up the others for some steps in a row."""
        if len(own_s) == 1 or not all(own_s):
            return
        step_s, self.noted_at = time.perf_counter() - self.noted_at, time.perf_counter()
        slowest = max(range(len(own_s)), key=own_s.__getitem__)
        usual_s = statistics.median([*own_s[:slowest], *own_s[slowest + 1 :]])
        self.metrics = {"perf/slowest_rank": slowest, "perf/slowest_rank_s": own_s[slowest], "perf/own_s": usual_s}
        slow = own_s[slowest] > max(SLOWER * usual_s, usual_s + SHARE * step_s)
        self.in_a_row = self.in_a_row + 1 if slow and slowest == self.slowest else int(slow)
        self.slowest = slowest
        if self.in_a_row == IN_A_ROW and self.mesh.rank == 0:
            text = "rank %d has held up the others for %d steps: it takes %.3g s to its first loss, they take %.3g"
            logger.warning(text, slowest, IN_A_ROW, own_s[slowest], usual_s)

    def _start(self, *_: object) -> None:
        if self.first_pass:
            self.started = self._now()

    def _end(self, *_: object) -> None:
        if self.first_pass and self.mesh.device.type == "cuda":
            self.times.append((self.started, self._now()))
        elif self.first_pass:
            self.forward_s = self._now() - self.started
        self.first_pass = False

    def _now(self) -> Any:
        if self.mesh.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def pending_collective() -> str:
    """Return the oldest collective that this rank's GPU has not finished, from NCCL's flight recorder; "" for none."""
    if not torch.cuda.is_initialized() or not dist.is_initialized():
        return ""
    entries = json.loads(c10d._dump_nccl_trace_json(onlyActive=True)).get("entries", [])  # type: ignore[attr-defined]
    oldest = min(entries, key=lambda entry: entry["record_id"], default=None)
    return "" if oldest is None else f"{oldest['profiling_name']} #{oldest['collective_seq_id']} ({oldest['state']})"
