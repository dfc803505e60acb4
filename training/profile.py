"""Profile of a training step: a trace, a memory snapshot, and a table of time by kind."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile, record_function

from training.config import PROFILED, WARM_UP
from training.optim.optimizer import UPDATE

logger = logging.getLogger(__name__)

WINDOW = "profiled steps"
KINDS = {
    "loss": ("_statistics_kernel", "_gradient_kernel", "_scaled_kernel", "_WithGradients"),
    "optimizer": (UPDATE, "_adamw_kernel", "fused_adam", "FusedAdam", "multi_tensor"),
    "attention": ("flash", "fmha", "cudnn_generated", "sdpa", "scaled_dot_product", "efficient_attention"),
    "communication": ("nccl", "c10d::", "gloo:"),
    "GEMM": (
        "nvjet", "gemm", "cutlass", "xmma", "cublas", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm",
        "_scaled_mm", "aten::mkldnn_linear", "mkl_linear",
    ),
}  # fmt: skip
# If kinds overlap, the time counts as the first of them in this order.
ORDER = ("optimizer", "GEMM", "attention", "loss", "elementwise", "communication")


def kind_of(name: str) -> str:
    """Return the kind of a kernel, or of an operation on the CPU."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "elementwise")


def time_by_kind(intervals: Iterable[tuple[float, float, str]], begin: float, end: float) -> dict[str, float]:
    """Divide the time from `begin` to `end` among the kinds of overlapping intervals; the rest is idle."""
    changes = []
    for start, stop, kind in intervals:
        start, stop = max(start, begin), min(stop, end)
        if stop > start:
            changes += [(start, 1, kind), (stop, -1, kind)]
    found: dict[str, float] = dict.fromkeys((*ORDER, "idle"), 0.0)
    running: dict[str, int] = defaultdict(int)
    at = begin
    for when, change, kind in [*sorted(changes), (end, 0, "idle")]:
        found[next((k for k in ORDER if running[k]), "idle")] += when - at
        at = when
        running[kind] += change
    return found


def profile_steps(step: Callable[[], object], device: torch.device, folder: Path) -> str:
    """Profile steps; write `table.txt`, `trace.json.gz` and on CUDA `memory.pickle`, and return the table."""
    folder.mkdir(parents=True, exist_ok=True)
    on_cuda = device.type == "cuda"

    def timed() -> tuple[float, float]:
        """Return the time of the host and of the whole step, in ms per step."""
        begun = time.perf_counter()
        for _ in range(PROFILED):
            step()
        host = time.perf_counter()
        if on_cuda:
            torch.cuda.synchronize(device)
        return (host - begun) * 1e3 / PROFILED, (time.perf_counter() - begun) * 1e3 / PROFILED

    for _ in range(WARM_UP):
        step()
    if on_cuda:
        torch.cuda.synchronize(device)
    plain_host, plain_step = timed()
    if on_cuda:
        torch.cuda.memory._record_memory_history()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities, acc_events=True) as found, record_function(WINDOW):
        host, whole = timed()
    if on_cuda:
        torch.cuda.memory._dump_snapshot(str(folder / "memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
    found.export_chrome_trace(str(folder / "trace.json.gz"))
    events: list[Any] = list(found.events() or [])
    window = next(e for e in events if e.name == WINDOW and e.device_type == DeviceType.CPU)
    # Kernels on CUDA; on the CPU all operations, nested ones included.
    work = [e for e in events if (e.device_type == DeviceType.CUDA) is on_cuda and e.name != WINDOW]
    intervals = [(e.time_range.start, e.time_range.end, kind_of(e.name)) for e in work]
    parts = time_by_kind(intervals, window.time_range.start, window.time_range.end)
    total = sum(parts.values())
    rows = [f"{'per step':15} {'ms':>10} {'share':>7}"]
    for kind, microseconds in {**parts, "step": total}.items():
        rows.append(f"{kind:15} {microseconds / 1e3 / PROFILED:10.3f} {microseconds / total:7.1%}")
    rows.append(f"launches per step: {len(intervals) // PROFILED:,}")
    rows.append(f"without the profiler: host {plain_host:.1f} ms, step {plain_step:.1f} ms")
    rows.append(f"with the profiler: host {host:.1f} ms, step {whole:.1f} ms")
    first = WARM_UP + PROFILED + 1
    rows.append(f"profiled: steps {first} to {first + PROFILED - 1} of this start; a run with profile=true ends here")
    text = "\n".join(rows)
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    for line in (*rows, f"trace and table in {folder}"):
        logger.info("%s", line)
    return text
