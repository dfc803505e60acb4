"""Which rank holds up the others: the time that each takes by itself in a step."""

import json
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
        self.mesh, self.on_gpu = mesh, mesh.device.type == "cuda"
        self.data_s = self.forward_s = 0.0
        self.marks: list[Any] = []  # starts and ends of forward passes, until the device has come to them
        self.marks_left = 0  # in this step
        self.noted_at = time.perf_counter()
        self.slowest, self.in_a_row = 0, 0
        self.metrics: dict[str, float] = {}

    @contextmanager
    def watch(self, engine: Engine) -> Iterator[None]:
        """Measure the forward passes of a model; not under a pipeline, where they wait for others, nor in a graph."""
        measured = self.mesh.world_size > 1 and self.mesh.axes.pp == 1 and engine.graphs is None
        with ExitStack() as hooks:
            for name in ("register_forward_pre_hook", "register_forward_hook") if measured else ():
                hooks.callback(getattr(engine.model, name)(self._mark).remove)
            yield

    def begin(self, data_s: float) -> None:
        """Begin a step, for whose batch this rank waited `data_s`."""
        self.data_s, self.marks_left = data_s, 2

    def own_s(self) -> float:
        """Return this rank's own time in the step just made, the first time it is asked for; then 0."""
        while len(self.marks) >= 2 and (not self.on_gpu or self.marks[1].query()):
            start, end = self.marks[:2]
            self.forward_s = start.elapsed_time(end) / 1e3 if self.on_gpu else end - start
            del self.marks[:2]
        own_s, self.data_s = self.data_s and self.data_s + self.forward_s, 0.0
        return own_s

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

    def _mark(self, *_: object) -> None:
        if self.marks_left:
            self.marks_left -= 1
            self.marks.append(torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter())
            if self.on_gpu:
                self.marks[-1].record()


def pending_collective() -> str:
    """Return the oldest collective that this rank's GPU has not finished, from NCCL's flight recorder; "" for none."""
    if not torch.cuda.is_initialized() or not dist.is_initialized():
        return ""
    entries = json.loads(c10d._dump_nccl_trace_json(onlyActive=True)).get("entries", [])  # type: ignore[attr-defined]
    oldest = min(entries, key=lambda entry: entry["record_id"], default=None)
    return "" if oldest is None else f"{oldest['profiling_name']} #{oldest['collective_seq_id']} ({oldest['state']})"
