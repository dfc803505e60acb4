"""A step before a GPU is bought: the real code on fake ranks, its memory, its collectives, an estimate of its time."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from data.batches import Batch
from dry_run.config import DryRunConfig
from dry_run.fake_compile import compile_with
from dry_run.fake_gpu import CPU, CUDA, pretended_gpu
from dry_run.memory import Memory
from dry_run.step_time import StepTime, step_time
from dry_run.trace import Ledger, Watch, Window
from parallel import pipeline
from parallel.axes import resolve_axes
from parallel.config import AXES, ParallelConfig
from parallel.engine import Engine
from parallel.mesh import Mesh, open_mesh

GIB = 2**30


class FakeBatch(Batch):
    """A micro-batch without numbers, full of segments of one length."""

    @staticmethod
    def of(rows: int, row_len: int, seq_len: int) -> "FakeBatch":
        tokens_BT = torch.zeros(rows, row_len, dtype=torch.int64)
        segments = torch.zeros(rows * row_len // seq_len + 1, dtype=torch.int32)
        return FakeBatch(tokens_BT, tokens_BT, tokens_BT, tokens_BT, segments, seq_len)


@dataclass(frozen=True, slots=True)
class Reading:
    """What one rank does in one step."""

    rank: int
    n_params: int  # numbers that this rank holds
    peak: int  # bytes
    at_peak: dict[str, int]  # bytes by kind
    table: dict[tuple[str, str], tuple[int, int]]  # count and bytes of collectives by (axis, kind)
    flops: int
    time: StepTime
    windows: list[Window] = field(repr=False)

    def further(self, before: "Reading", times: float) -> "Reading":
        """Give the step that goes on from `before` to this one `times` more."""
        table = {}
        for key, (count, n_bytes) in self.table.items():
            old_count, old_bytes = before.table.get(key, (0, 0))
            table[key] = round(count + (count - old_count) * times), round(n_bytes + (n_bytes - old_bytes) * times)
        seconds = {
            name: getattr(self.time, name) + (getattr(self.time, name) - getattr(before.time, name)) * times
            for name in ("compute_s", "waiting_s", "exposed_s", "bubble_s")
        }
        flops = round(self.flops + (self.flops - before.flops) * times)
        return replace(self, table=table, flops=flops, time=StepTime(**seconds))


class DryRun:
    """Runs steps on fake ranks of one layout.

    `build` makes the engine of a rank on its mesh, `batch` a micro-batch; `kernels` are the modules of Triton
    kernels that they use.
    """

    def __init__(
        self,
        build: Callable[[Mesh], Engine],
        batch: Callable[[], FakeBatch],
        layout: ParallelConfig,
        config: DryRunConfig,
        *,
        kernels: Sequence[str] = (),
    ) -> None:
        self.build, self.batch, self.layout, self.config, self.kernels = build, batch, layout, config, kernels
        self.axes = resolve_axes(layout, config.world_size)

    def read(self, n_micro_batches: int) -> list[Reading]:
        """Read a step of so many micro-batches a rank, on one rank of every pipeline stage.

        A micro-batch adds the same from the third round of the pipeline on, so a long step is not run to its end.
        """
        unit = self.axes.pp * self.layout.virtual_stages
        most = 4 * unit
        readings = []
        for rank in range(0, self.axes.world_size, self.axes.world_size // self.axes.pp):
            if n_micro_batches <= most:
                readings.append(self.read_rank(rank, n_micro_batches))
            else:
                before, last = self.read_rank(rank, most - unit), self.read_rank(rank, most)
                readings.append(last.further(before, (n_micro_batches - most) / unit))
        bubble = (self.axes.pp - 1) / (n_micro_batches * self.layout.virtual_stages)
        if "z" in self.layout.pipeline_schedule.value:  # weight gradients fill two thirds of it (arXiv:2401.10241)
            bubble /= 3
        return [replace(reading, time=reading.time.with_bubble(bubble)) for reading in readings]

    def read_rank(self, rank: int, n_micro_batches: int) -> Reading:
        """Run a step of one rank, and give what it did."""
        memory, ledger = Memory(), Ledger({axis: getattr(self.axes, axis) for axis in AXES})
        with ExitStack() as stack:
            mesh = stack.enter_context(fake_mesh(self.layout, rank, self.config.world_size))
            stack.enter_context(pretended_gpu(self.kernels, ledger.launched))
            stack.enter_context(memory.following())
            watch = stack.enter_context(Watch([memory]))
            stack.enter_context(mock.patch.object(torch, "compile", compile_with(ledger, watch.paused)))
            stack.enter_context(mock.patch.object(pipeline, "finish", memory.holding("gradients")(pipeline.finish)))
            with memory.holding("optimizer"):
                engine = self.build(mesh)
            params = list(engine.model.parameters())
            memory.rename(params, "parameters")
            n_params = sum(local(param).numel() for param in params)
            memory.forget_peak()  # what drew the weights did so on the host
            engine.linear_loss = _watched_loss(engine, memory)
            engine.optimizer.step = memory.holding("optimizer")(engine.optimizer.step)  # type: ignore[method-assign]
            watch.observers.append(ledger)
            engine.train_step([self.batch() for _ in range(n_micro_batches)])
        workspace = self.config.workspace_mib * 2**20
        at_peak = {**memory.at_peak(), "workspace": workspace}
        flops = sum(window.flops for window in ledger.windows)
        time = step_time(ledger.windows, self.config)
        return Reading(rank, n_params, memory.peak + workspace, at_peak, ledger.table(), flops, time, ledger.windows)


def _watched_loss(engine: Engine, memory: Memory) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Let a loss's tensors be logits, and what the model's modules hold by then, gathered or not, be parameters."""
    linear_loss = memory.holding("logits")(engine.linear_loss)

    def loss(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        memory.rename(engine.model.parameters(), "parameters")
        return linear_loss(*args, **kwargs)

    return loss


@contextmanager
def fake_mesh(layout: ParallelConfig, rank: int, world_size: int) -> Iterator[Mesh]:
    """Be one rank of a world whose messages go nowhere."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    made, world = DeviceMesh.__init__, time.monotonic_ns()

    def init(mesh: DeviceMesh, *args: Any, **kwargs: Any) -> None:
        """Make the meshes of each world different, so that DTensor, which keeps meshes, does not mistake them."""
        made(mesh, *args, **kwargs)
        mesh._thread_id = world

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    patch = mock.patch.object(DeviceMesh, "__init__", init)
    patch.start()
    try:
        mesh = open_mesh(resolve_axes(layout, world_size), zero_stage=layout.zero_stage, device=CPU)
        yield replace(mesh, device=CUDA)
    finally:
        patch.stop()
        dist.destroy_process_group()


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def report(
    run: DryRun, *, name: str, n_params: int, global_batch_tokens: int, micro_batch_tokens: int
) -> Iterator[str]:
    """Read a step and tell what it is, line by line. A batch that does not fill the ranks is told, and filled."""
    config, axes = run.config, run.axes
    full = micro_batch_tokens * axes.dp
    n_micro_batches = max(1, global_batch_tokens // full)
    yield f"model      {name}: {n_params:,} parameters"
    yield f"layout     {axes} = {axes.world_size:,} GPUs, zero_stage {run.layout.zero_stage}"
    yield (
        f"batch      {n_micro_batches * full:,} tokens a step = {axes.dp:,} data-parallel ranks x {n_micro_batches} "
        f"micro-batches x {micro_batch_tokens:,}"
    )
    if n_micro_batches * full != global_batch_tokens:
        yield (
            f"           global_batch_tokens ({global_batch_tokens:,}) does not fill these ranks; to train, pass a "
            f"multiple of {full:,}"
        )
    readings = run.read(n_micro_batches)
    for reading in readings:
        fits = reading.peak / GIB <= config.device_memory_gib
        beyond = "" if fits else f", more than dry_run.device_memory_gib ({config.device_memory_gib:g})"
        parts = ", ".join(f"{kind} {n_bytes / GIB:.2f}" for kind, n_bytes in reading.at_peak.items() if n_bytes)
        yield f"rank {reading.rank:<6}{reading.n_params:,} parameters held; peak {reading.peak / GIB:.2f} GiB{beyond}:"
        yield f"           {parts}"
    worst = max(readings, key=lambda reading: reading.peak)
    where = f", on rank {worst.rank}, which needs the most memory" if len(readings) > 1 else ""
    yield f"{'collective':<16} {'axis':<22} {'count':>7} {'bytes':>20}   of one step{where}"
    for (axis, kind), (count, n_bytes) in worst.table.items():
        yield f"{kind:<16} {axis:<22} {count:>7,} {n_bytes:>20,}"
    if not worst.table:
        yield "none"
    time = max((reading.time for reading in readings), key=lambda time: time.total_s)
    tokens_per_gpu = n_micro_batches * full / axes.world_size
    yield f"step time  {time.total_s:.3f} s, {tokens_per_gpu / time.total_s:,.0f} tokens/s a GPU, by this estimate:"
    yield (
        f"           computing {time.compute_s:.3f}, waiting for tensor, sequence, pipeline peers {time.waiting_s:.3f},"
    )
    yield f"           for gradients and parameters that nothing hides {time.exposed_s:.3f}, bubble {time.bubble_s:.3f}"
    for key in ("peak_tflops", "flops_efficiency", "memory_gbps", "memory_efficiency"):
        yield f"           dry_run.{key} {getattr(config, key):g}"
    for key in ("gbps", "latency_us"):
        inside, outside = getattr(config, f"intra_node_{key}"), getattr(config, f"inter_node_{key}")
        yield f"           dry_run.intra_node_{key} {inside:g}, dry_run.inter_node_{key} {outside:g}"
    yield f"           dry_run.launch_us {config.launch_us:g}, dry_run.overlap {config.overlap:g}"
