"""Profile of a step, run with the real code on fake ranks: memory, collectives, FLOPs, estimated time.

The time of a collective is a launch, a latency per hop of the ring, and its bytes over the slowest link
(Hockney's alpha-beta model with the ring algorithms of Thakur et al. 2005, doi:10.1177/1094342005051521).
"""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field, replace
from itertools import chain
from unittest import mock

import torch
from torch import Tensor

from conf.schema import TrainConfig
from data.batches import Batch
from dry_run.config import DryRunConfig
from dry_run.fake_compile import fake_compile
from dry_run.fake_gpu import fake_gpu, fake_mesh
from dry_run.memory import Memory
from dry_run.trace import Collective, Phase, Trace, n_bytes
from model.config import Attention
from parallel.axes import resolve_axes
from parallel.config import AXES
from parallel.engine import Engine
from parallel.mesh import Mesh
from parallel.peers import SideStream
from parallel.zero import Unit, Zero
from training.setup import build_engine, build_model, lr_schedule
from training.state import TrainState


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step by cause."""

    compute_s: float
    blocking_s: float  # collectives that do not overlap
    exposed_s: float  # data-parallel collectives beyond what compute hides
    update_s: float  # the optimizer's part of compute_s and blocking_s
    bubble_s: float = 0.0  # pipeline bubble

    @property
    def total_s(self) -> float:
        return self.compute_s + self.blocking_s + self.exposed_s + self.bubble_s


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Memory, collectives, FLOPs and time of one rank in one step."""

    rank: int
    n_params: int  # on the rank
    peak_bytes: int
    bytes_at_peak: dict[str, int]  # by kind
    collectives: dict[tuple[str, str], tuple[int, int]]  # (axis, kind): count, bytes
    flops: int
    time: StepTime
    phases: list[Phase] = field(repr=False)


def profile_step(config: TrainConfig, n_micro_batches: int) -> list[StepProfile]:
    """Profile a step of `n_micro_batches` per rank, on one rank of every pipeline stage.

    Long steps are extrapolated: from the third round of the pipeline on, every round is the same.
    """
    parallel, world_size = config.parallel, config.dry_run.world_size
    pp = resolve_axes(parallel, world_size).pp
    round_size = pp * parallel.virtual_stages
    longest = 4 * round_size
    bubble = (pp - 1) / (n_micro_batches * parallel.virtual_stages)  # as a share of the busy time
    profiles = []
    for rank in range(0, world_size, world_size // pp):
        profile = profile_rank(config, rank, min(n_micro_batches, longest))
        if n_micro_batches > longest:
            before = profile_rank(config, rank, longest - round_size)
            profile = _extrapolate(before, profile, (n_micro_batches - longest) / round_size)
        bubble_s = bubble * (profile.time.compute_s + profile.time.blocking_s)
        profiles.append(replace(profile, time=replace(profile.time, bubble_s=bubble_s)))
    return profiles


def profile_rank(config: TrainConfig, rank: int, n_micro_batches: int) -> StepProfile:
    """Run a step of one fake rank, with synchronous tensor parallelism: there is no memory to share."""
    async_tp = config.parallel.async_tp
    config = replace(config, parallel=replace(config.parallel, async_tp=False))
    axes = resolve_axes(config.parallel, config.dry_run.world_size)
    memory = Memory()
    trace = Trace({axis: getattr(axes, axis) for axis in AXES}, memory)

    def all_gather(zero: Zero, unit: Unit) -> None:  # whose operations are not traced
        trace.add_collective("all_gather", zero.shard_group, n_bytes(unit.padded_params))

    with ExitStack() as stack:
        mesh = stack.enter_context(fake_mesh(config.parallel, rank, axes.world_size))
        stack.enter_context(fake_gpu(trace.record_kernel))
        stack.enter_context(memory.following_zero())
        stack.enter_context(trace)
        stack.enter_context(mock.patch.object(torch, "compile", fake_compile(trace)))
        # Disable paths whose collectives or products cannot be traced.
        for fast_path in ("parallel.zero.can_share", "training.optim.muon.takes_kernel"):
            stack.enter_context(mock.patch(fast_path, lambda *_: False))
        stack.enter_context(mock.patch.object(Zero, "_all_gather", all_gather))
        stack.enter_context(mock.patch.object(SideStream, "after_current", lambda _: trace.overlapped()))
        with memory.label("optimizer"):
            engine = _build_engine(config, mesh)
        shards = [param.shard for param in engine.params.values()]
        memory.relabel([*engine.model.parameters(), *shards], "parameters")
        if config.parallel.cuda_graphs:
            with memory.label("gradients"):
                _keep_gradients(engine)
        n_params = sum(shard.numel() for shard in shards)
        memory.reset_peak()  # initialisation was on the host
        _label_engine(engine, memory, trace)
        trace.recording = True
        engine.train_step([_batch(config) for _ in range(n_micro_batches)])
    workspace = config.dry_run.workspace_mib * 2**20
    bytes_at_peak = {**memory.bytes_at_peak(), "workspace": workspace}
    time = estimate_time(trace.phases, config.dry_run, async_tp=async_tp)
    peak = memory.peak_bytes + workspace
    flops = sum(phase.flops for phase in trace.phases)
    return StepProfile(rank, n_params, peak, bytes_at_peak, trace.collectives(), flops, time, trace.phases)


def _build_engine(config: TrainConfig, mesh: Mesh) -> Engine:
    """Build the engine as for training, without features that need a real GPU."""
    model = config.model
    if model.attention is not Attention.reference:
        model = replace(model, attention=Attention.sdpa)  # runs on CPU, and saves the same tensors as fused kernels
    config = replace(config, model=model, parallel=replace(config.parallel, cuda_graphs=False))
    state = TrainState()
    engine = build_engine(config, build_model(config, mesh), state)
    engine.optimizer.set_schedule(lr_schedule(config, state)[:1])
    return engine


def _keep_gradients(engine: Engine) -> None:
    """Allocate what CUDA graphs keep between steps: gradients or, with ZeRO, their sums over ranks."""
    if engine.zero is None:
        for param in engine.model.parameters():
            param.grad = torch.empty_like(param)
    else:
        for unit in chain.from_iterable(engine.zero.units):
            unit.grads = torch.empty(unit.length, dtype=engine.zero.reduce_dtype, device=engine.mesh.device)


def _label_engine(engine: Engine, memory: Memory, trace: Trace) -> None:
    """Label the allocations and operations of loss and optimizer."""
    engine.linear_loss = memory.label("logits")(engine.linear_loss)
    engine.aux_names = []  # needs real collectives
    update = memory.label("optimizer")(engine.optimizer.step)

    def step(**kwargs: Tensor) -> Tensor:
        trace.phases.append(Phase(backward=False, update=True))
        return update(**kwargs)

    engine.optimizer.step = step  # type: ignore[method-assign]


def _batch(config: TrainConfig) -> Batch:
    """Return a micro-batch of zeros, full of segments of `data.seq_len` tokens."""
    data, n_tokens = config.data, config.micro_batch_tokens
    zeros_BT = torch.zeros(n_tokens // data.pack_tokens, data.pack_tokens, dtype=torch.int64)
    cu_seqlens = torch.zeros(n_tokens // data.seq_len + 1, dtype=torch.int32)
    return Batch(zeros_BT, zeros_BT, zeros_BT, zeros_BT, cu_seqlens, data.seq_len)


def _extrapolate(before: StepProfile, last: StepProfile, times: float) -> StepProfile:
    """Return `last + times * (last - before)`."""

    def extend(old: float, new: float) -> float:
        return new + (new - old) * times

    collectives = {}
    for key, (count, total) in last.collectives.items():
        old_count, old_total = before.collectives.get(key, (0, 0))
        collectives[key] = round(extend(old_count, count)), round(extend(old_total, total))
    time = StepTime(*map(extend, astuple(before.time), astuple(last.time)))
    return replace(last, collectives=collectives, flops=round(extend(before.flops, last.flops)), time=time)


def estimate_time(phases: Iterable[Phase], config: DryRunConfig, *, async_tp: bool = False) -> StepTime:
    """Estimate a step without the pipeline bubble; `phases` have the messages of synchronous tensor parallelism."""
    compute = blocking = exposed = update = 0.0
    for phase in phases:
        busy = compute_s(phase, config)
        overlapping, blocked = 0.0, blocking
        for item in phase.collectives:
            if item.overlaps:
                overlapping += collective_s(item, config)
            else:
                hidden = async_tp and item.axis == "tp" and item.kind in ("all_gather", "reduce_scatter")
                blocking += collective_s(item, config) * (1 - config.async_tp_overlap * hidden)
        compute += busy
        exposed += max(0.0, overlapping - busy * config.overlap)
        update += (busy + blocking - blocked) * phase.update
    return StepTime(compute, blocking, exposed, update)


def compute_s(phase: Phase, config: DryRunConfig) -> float:
    products = phase.flops - phase.attention_flops - phase.fp8_flops
    bf16_s = products / config.flops_efficiency + phase.attention_flops / config.attention_efficiency
    fp8_s = phase.fp8_flops / config.fp8_efficiency / (config.fp8_tflops * 1e12)
    memory_s = phase.n_bytes / (config.memory_gbps * 1e9 * config.memory_efficiency)
    return bf16_s / (config.peak_tflops * 1e12) + fp8_s + memory_s


def collective_s(item: Collective, config: DryRunConfig) -> float:
    n_ranks = len(item.ranks)
    n_nodes = len({rank // config.devices_per_node for rank in item.ranks})
    hops = 1 if item.kind in ("send", "recv") else n_ranks - 1
    # Fraction of the bytes that passes over a link
    share = 1.0 if item.kind in ("send", "recv", "broadcast") else (n_ranks - 1) / n_ranks
    far = min(hops, n_nodes) if n_nodes > 1 else 0  # hops between nodes
    latency_us = far * config.inter_node_latency_us + (hops - far) * config.intra_node_latency_us
    gbps = config.intra_node_gbps
    if n_nodes > 1:  # the ranks of a node share its network cards
        gbps = min(gbps, config.inter_node_gbps * n_ranks / n_nodes)
    pass_s = latency_us * 1e-6 + share * item.n_bytes / (gbps * 1e9)
    return config.launch_us * 1e-6 + (2 if item.kind == "all_reduce" else 1) * pass_s
