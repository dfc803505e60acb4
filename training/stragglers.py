"""Detection of ranks that slow down the others, or block them on the GPU."""

import ctypes
import json
import logging
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from parallel.engine import Engine
from parallel.mesh import Mesh

SLOWER, SHARE = 1.1, 0.02  # factor on the median of the others, and minimum excess as a fraction of the step
IN_A_ROW = 10  # steps before a warning

logger = logging.getLogger(__name__)


class Stragglers:
    """Compares the ranks' own times: waiting for data, and the forward pass of the first micro-batch.

    Neither depends on other ranks, unless weights, sequences or layers are split over ranks. Device times are read
    without synchronizing, possibly some steps later.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.on_gpu = mesh, mesh.device.type == "cuda"
        self.data_s = self.forward_s = 0.0
        self.marks: list[Any] = []  # events at starts and ends of forward passes, not yet read
        self.marks_left = 0  # in this step
        self.noted_at = time.perf_counter()
        self.slowest, self.in_a_row = 0, 0
        self.metrics: dict[str, float] = {}

    @contextmanager
    def watch(self, engine: Engine) -> Iterator[None]:
        """Time the forward passes of a model, except under a pipeline, where they wait for others, or CUDA graphs."""
        measured = self.mesh.world_size > 1 and self.mesh.axes.pp == 1 and engine.graphs is None
        with ExitStack() as hooks:
            for name in ("register_forward_pre_hook", "register_forward_hook") if measured else ():
                hooks.callback(getattr(engine.model, name)(self._mark).remove)
            yield

    def begin(self, data_s: float) -> None:
        """Start a step; `data_s` is the time this rank waited for its batch."""
        self.data_s, self.marks_left = data_s, 2

    def own_s(self) -> float:
        """Return this rank's own time in the last step on the first call, then 0."""
        while len(self.marks) >= 2 and (not self.on_gpu or self.marks[1].query()):
            start, end = self.marks[:2]
            self.forward_s = start.elapsed_time(end) / 1e3 if self.on_gpu else end - start
            del self.marks[:2]
        own_s, self.data_s = self.data_s and self.data_s + self.forward_s, 0.0
        return own_s

    def note(self, own_s: Sequence[float]) -> None:
        """Record the times of all ranks; warn if one has been slowest for `IN_A_ROW` steps."""
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
            text = "rank %d has slowed down the others for %d steps: data and first forward take %.3g s, others' %.3g s"
            logger.warning(text, slowest, IN_A_ROW, own_s[slowest], usual_s)

    def _mark(self, *_: object) -> None:
        if self.marks_left:
            self.marks_left -= 1
            self.marks.append(torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter())
            if self.on_gpu:
                self.marks[-1].record()


def pending_collective() -> str:
    """Return the oldest unfinished collective of this rank's GPU, from NCCL's flight recorder, or ""."""
    if not torch.cuda.is_initialized() or not dist.is_initialized():
        return ""
    entries = json.loads(c10d._dump_nccl_trace_json(onlyActive=True)).get("entries", [])  # type: ignore[attr-defined]
    oldest = min(entries, key=lambda entry: entry["record_id"], default=None)
    return "" if oldest is None else f"{oldest['profiling_name']} #{oldest['collective_seq_id']} ({oldest['state']})"


class CollectiveTimeoutError(RuntimeError):
    """The GPU waits in a collective that does not finish."""

    def __str__(self) -> str:  # it is raised without arguments
        return "the GPU waits in a collective that does not finish (parallel.step_timeout_s)"


def expire_collectives(device: torch.device, trace_file: Path) -> None:
    """If the device is busy, abort its collectives, and raise `CollectiveTimeoutError` in the thread that waits for it.

    NCCL's own timeout aborts the process, which then cannot record why. `trace_file` gets NCCL's flight recorder, for
    torchfrtrace.
    """
    if device.type != "cuda" or not dist.is_initialized():
        return
    with suppress(OSError):
        trace_file.write_bytes(c10d._dump_nccl_trace())  # type: ignore[attr-defined]
    if torch.cuda.default_stream(device).query():
        return
    main = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(CollectiveTimeoutError))  # once it is free
    _abort_collectives()


@contextmanager
def aborting_collectives() -> Iterator[None]:
    """After an error, free the GPU from collectives that other ranks will not join."""
    try:
        yield
    except Exception:
        _abort_collectives()
        raise


def _abort_collectives() -> None:
    for group in list(dist.distributed_c10d._world.pg_map):
        if dist.get_backend(group) == "nccl":
            threading.Thread(target=group.abort, daemon=True).start()  # returns once no graph has its collectives
