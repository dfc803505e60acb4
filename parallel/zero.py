"""ZeRO: parameters, gradients and optimizer state sharded over data-parallel ranks, by explicit collectives.

A unit is a block, the embedding, or norm and head. Its parameters are views of one flat buffer of equal row shards,
ordered by parameter and then by rank, so that an all-gather needs no copy. Gradients are packed by rank and
reduce-scattered. Collectives run on a separate stream:

    stage 0     gradients are all-reduced
    stage 1     full gradients are accumulated and reduced once per step; weights are gathered once, during the forward
                pass of the next step
    stage 2     gradients are reduced in each micro-batch, overlapped with the backward pass
    stage 3     weights too are gathered in each pass just before use, and freed after it
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model.transformer import Transformer
from parallel.config import ParallelConfig, ReduceDtype
from parallel.mesh import Mesh
from parallel.peers import Buffer, SharedBuffer, SideStream, can_share, weakly
from parallel.shards import ALIGNMENT, matrices_first
from parallel.tensor_parallel import collectives, exchange

# Ranks up to which gradients are exchanged by all-to-all, whose messages get short with more of them.
MAX_EXCHANGE = 8


class Unit:
    """Parameters that are gathered and reduced together: those of some modules, in one flat buffer."""

    def __init__(self, modules: dict[str, nn.Module], zero: "Zero") -> None:
        group, device, reshards = zero.shard_group, zero.device, zero.reshards
        rank, n_shards = group.rank(), group.size()
        self.modules, self.n_shards = modules, n_shards
        self.is_block = all(path.startswith("blocks.") for path in modules)
        owners = {
            f"{path}.{name}": (module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], param)
            for path, module in modules.items()
            for name, param in matrices_first(module)
        }
        shapes = [param.shape for *_, param in owners.values()]
        self.dtype = next(param.dtype for *_, param in owners.values())
        # of each parameter: elements per shard, including padding of the last rows, and the offset of its shards
        self.sizes = [-(-shape[0] // n_shards) * shape[1:].numel() for shape in shapes]
        self.starts, self.length = [], 0
        for size in self.sizes:
            self.starts.append(self.length)
            self.length += -(-size // ALIGNMENT) * ALIGNMENT
        n_resident = self.length if reshards else self.length * n_shards  # between steps
        self.shared = shared = SharedBuffer(n_resident, self.dtype, device, group) if zero.reads_peers else None
        resident = torch.empty(n_resident, dtype=self.dtype, device=device) if shared is None else shared.local
        self.full = torch.empty(self.length * n_shards, dtype=self.dtype, device=device) if reshards else resident
        self.n_bytes = self.full.untyped_storage().nbytes()
        self.params: list[nn.Parameter] = []  # full, as the model reads them
        self.shards: dict[str, Tensor] = {}  # of this rank, as the optimizer updates them
        # flat, with padding: each full parameter, and this rank's shard
        self.padded_params: list[Tensor] = []
        self.padded_shards: list[Tensor] = []
        self.peer_copies: list[tuple[Tensor, Tensor]] = []  # (target, source) of copies that gather the unit
        layout = zip(owners.items(), shapes, self.sizes, self.starts, strict=True)
        for (name, (owner, leaf, _)), shape, size, start in layout:
            full = self.full[start * n_shards :][: size * n_shards]
            padded_shard = resident[start:][:size] if reshards else full[size * rank :][:size]
            param = nn.Parameter(full[: shape.numel()].view(shape))
            setattr(owner, leaf, param)
            n_elements = max(0, min(size, shape.numel() - size * rank))  # without padding
            self.params.append(param)
            self.shards[name] = padded_shard[:n_elements].view(-1, *shape[1:])
            self.padded_params.append(full)
            self.padded_shards.append(padded_shard)
            if shared is not None:
                for peer in shared.others():
                    offset = start if reshards else start * n_shards + size * peer
                    self.peer_copies.append((full[size * peer :][:size], shared.of(peer, offset, size)))
                if reshards:
                    self.peer_copies.append((full[size * rank :][:size], padded_shard))
        self.is_gathered = not reshards  # memory is allocated, and the gather has been started
        self.ready: Any = None  # event after which the parameters can be read
        self.accumulated: Buffer | None = None  # full gradients, summed over micro-batches
        self.grads = resident.new_empty(0)  # of this rank's shards, summed over ranks
        self.n_missing = 0  # number of gradients left to compute in the backward pass
        self.is_leading = False  # one of the first two, which the next forward pass needs first
        self.before: Unit | None = None  # next in the backward pass
        self.after: Unit | None = None

    def pack(self, grads: list[Tensor], out: Tensor, begin: int) -> None:
        """Write elements `begin` to `begin + n` of each rank's gradients to `out`, (n_shards, n)."""
        parts, at, end = [], begin, begin + out.shape[1]
        for flat, size, start in zip(grads, self.sizes, self.starts, strict=True):
            if start < end and at < start + size:
                parts.append(flat[:, at - start : end - start])
                at = min(end, start + size)
            if start <= at < end and (gap := min(end, at + -size % ALIGNMENT) - at):
                parts.append(flat.new_zeros(self.n_shards, gap))
                at += gap
        torch.cat(parts, dim=1, out=out)

    def accumulate(self, out: Tensor, *, first: bool) -> None:
        """Move the gradients to `out`, or add them; the layout is that of `pack`, and padding is left as it is."""
        for flat, size, start in zip(self.take_grads(), self.sizes, self.starts, strict=True):
            part = out[:, start : start + size]
            part.copy_(flat) if first else part.add_(flat)

    def take_grads(self) -> Iterator[Tensor]:
        """Yield the gradients as (n_shards, size), including padding, and set them to None."""
        for param, size in zip(self.params, self.sizes, strict=True):
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            flat, param.grad = grad.reshape(-1), None
            padding = size * self.n_shards - len(flat)
            yield (F.pad(flat, (0, padding)) if padding else flat).view(self.n_shards, size)

    def resize(self, n_bytes: int) -> None:
        self.is_gathered = n_bytes > 0
        if self.full.untyped_storage().nbytes() != n_bytes:  # resize_ reallocates even at the same size
            self.full.untyped_storage().resize_(n_bytes)


class Zero:
    """Gathers and reshards the parameters of a model's stages, and reduces their gradients."""

    def __init__(
        self, stages: Sequence[Transformer], mesh: Mesh, config: ParallelConfig, grad_dtype: torch.dtype
    ) -> None:
        assert mesh.param_mesh is not None
        self.stage, self.device = config.zero_stage, mesh.device
        self.shard_group, self.copy_group = (mesh.param_mesh.get_group(axis) for axis in ("dp_shard", "dp_replicate"))
        self.n_shards = self.shard_group.size()
        self.reshards = self.stage == 3 and self.n_shards > 1
        self.grad_dtype = grad_dtype  # of gradients accumulated over micro-batches
        self.reduce_dtype = torch.float32 if config.reduce_dtype is ReduceDtype.fp32 else torch.bfloat16
        # Within a node, copy engines read weights and gradients, which leaves all SMs to computation.
        self.reads_peers = can_share(self.shard_group, mesh.device)
        self.flag = SharedBuffer(1, torch.int32, mesh.device, self.shard_group) if self.reads_peers else None
        self.stream = SideStream(mesh.device)
        self.units: list[list[Unit]] = []  # of each stage, in the order of the forward pass
        for stage in stages:
            units = [Unit(modules, self) for modules in units_of(stage)]
            self.units.append(units)
            for unit, next_unit in pairwise(units):
                unit.after, next_unit.before = next_unit, unit
            for number, unit in enumerate(units):
                unit.is_leading = number < 2
                self._hook(unit)
        self.pending: list[Unit] = []  # units to reduce in this backward pass, in reverse order
        self.first = self.last = True
        self.early_unit: Unit | None = None  # gathered during the last update, beside that of other units
        # CUDA graphs need each capture to end on one stream, and gradients at fixed addresses.
        self.in_graphs = False
        self.in_flight: deque[Any] = deque()  # events after the latest reductions
        # Packed gradients of at most a block: one bucket is written while others are read.
        self.buckets: list[Buffer] = []
        self.next_bucket = 0
        self.sum_ranks = torch.compile(sum_ranks, dynamic=True) if config.compiles(mesh.device.type) else sum_ranks
        self.bucket_length = max(unit.length for unit in chain.from_iterable(self.units) if unit.is_block)

    @property
    def shards(self) -> dict[str, Tensor]:
        """This rank's shards of the stages' parameters, by name."""
        return {name: shard for units in self.units for unit in units for name, shard in unit.shards.items()}

    def _hook(self, unit: Unit) -> None:
        for shard in unit.shards.values():
            shard.grad_dtype = self.reduce_dtype  # type: ignore[attr-defined]
        for param in unit.params:
            param.register_post_accumulate_grad_hook(weakly(self._on_gradient, unit))
        for name, module in unit.modules.items():
            after = None if name == "norm" else unit.after  # a norm is last, also in a unit with the embedding
            module.register_forward_pre_hook(lambda *_, after=after: self._wait_gathered(unit, after))
        if not self.reshards:
            return
        unit.resize(0)
        if "norm" not in unit.modules:  # the head needs it, and then immediately the backward pass
            (module,) = unit.modules.values()
            module.register_forward_hook(lambda _module, _inputs, output: self._after_forward(unit, output))

    # --- gathering

    def gather(self) -> None:
        """Start to gather the parameters that stay full between passes, in forward order."""
        self._barrier()  # until all ranks have updated their shards
        if self.n_shards > 1 and not self.reshards:
            for unit in chain.from_iterable(self.units):
                if unit is not self.early_unit:
                    self._gather(unit)
        if self.in_graphs:
            self.free()  # replayed graphs leave parameters of the previous step gathered

    def gather_early(self, updated: Collection[str]) -> None:
        """Start to gather the first unit of the next step once all of its shards are updated."""
        first = self.units[0][0]
        if self.reads_peers and self.early_unit is None and first.shards.keys() <= set(updated):
            self._barrier()
            self._gather(first)
            self.early_unit = first

    def _gather(self, unit: Unit) -> None:
        if not unit.is_gathered:
            unit.resize(unit.n_bytes)
        # Autograd may not see a change: the backward pass reads the same values, gathered again.
        autograd: Any = torch.autograd
        with self.stream.after_current(), autograd._unsafe_preserve_version_counter(unit.full):
            self._all_gather(unit)
        unit.ready = self.stream.event()

    def _all_gather(self, unit: Unit) -> None:
        if self.reads_peers:
            for target, source in unit.peer_copies:
                target.copy_(source)
            return
        self.shard_group.allgather_into_tensor_coalesced(unit.padded_params, unit.padded_shards).wait()

    def _wait_gathered(self, unit: Unit, next_unit: Unit | None) -> None:
        """Make the current stream wait for a unit's parameters, and start to gather the next unit."""
        if not unit.is_gathered:
            self._gather(unit)
        self.stream.wait(unit.ready)
        unit.ready = None
        if next_unit is not None and not next_unit.is_gathered:
            self._gather(next_unit)

    def _after_forward(self, unit: Unit, output: Any) -> None:
        """Free a unit's parameters after its forward pass, and gather them again before its backward pass."""
        x = output[0] if isinstance(output, tuple) else output
        if unit.is_block and x.requires_grad:
            before = unit.before if unit.before and unit.before.is_block else None
            x.register_hook(lambda _: self._wait_gathered(unit, before))
            if unit.after and not unit.after.is_block:
                return  # the backward pass starts with this block
        self._free(unit)

    def free(self) -> None:
        """Free the gathered parameters in stage 3."""
        self.last = True
        for unit in chain.from_iterable(self.units):
            self._free(unit)

    # --- reducing

    def begin_backward(self, stage: int, *, first: bool, last: bool) -> None:
        """Prepare for a backward pass of a stage; `first` and `last` are the micro-batch's position in the step."""
        self.pending, self.first, self.last = list(self.units[stage]), first, last
        self.next_bucket *= not self.in_graphs  # the same on all ranks: replays do not run this code
        for unit in self.pending:
            unit.n_missing = len(unit.params)
            if self.in_graphs and self.reshards and unit.is_leading:
                unit.is_gathered, unit.ready = not first or unit is self.early_unit, None

    def end_backward(self) -> None:
        """Reduce the remaining units; gradients that were not computed are zeros."""
        while self.pending:
            self._reduce(self.pending.pop())
        if self.in_graphs:
            self._barrier()  # the next replay writes to the same buckets
            self._join()

    def _on_gradient(self, unit: Unit) -> None:
        unit.n_missing -= 1
        while self.pending and self.pending[-1].n_missing == 0:  # in the same order on all ranks
            self._reduce(self.pending.pop())

    def _reduce(self, unit: Unit) -> None:
        """Accumulate a unit's gradients of a micro-batch, or reduce-scatter them, as the ZeRO stage does."""
        if self.stage < 2 and not (self.first and self.last):
            if unit.accumulated is None:
                unit.accumulated = self._buffer(unit.length, unit.full, self.grad_dtype)
            unit.accumulate(unit.accumulated.local.view(self.n_shards, -1), first=self.first)
            if self.last:
                self._reduce_scatter(unit, unit.accumulated, 0, unit.length)
        else:
            grads = list(unit.take_grads())
            for begin in range(0, unit.length, self.bucket_length):
                n = min(self.bucket_length, unit.length - begin)
                bucket = self._next_bucket(unit)
                unit.pack(grads, bucket.local[: n * self.n_shards].view(self.n_shards, n), begin)
                self._reduce_scatter(unit, bucket, begin, n)
        self._free(unit)

    def _free(self, unit: Unit) -> None:
        """Free a unit's parameters in stage 3, except for the leading units before another micro-batch."""
        if not self.reshards or (unit.is_leading and not self.last):
            return
        if unit.is_leading and self.in_graphs:
            unit.is_gathered = False  # keep the memory: graphs have recorded its address
        else:
            unit.resize(0)

    def _buffer(self, length: int, like: Tensor, dtype: torch.dtype) -> Buffer:
        """Return a buffer of zeros for packed gradients, readable by the other ranks within a node."""
        if not self.reads_peers:
            return Buffer(like.new_zeros(length * self.n_shards, dtype=dtype))
        buffer = SharedBuffer(length * self.n_shards, dtype, self.device, self.shard_group)
        buffer.local.zero_()
        return buffer

    def _next_bucket(self, unit: Unit) -> Buffer:
        """Return the least recently used bucket; the barrier of a later reduction shows that all ranks have read it."""
        while len(self.in_flight) > 1:
            self.stream.wait(self.in_flight.popleft())
        if not self.buckets:
            self.buckets = [self._buffer(self.bucket_length, unit.full, unit.dtype) for _ in range(3)]
        self.next_bucket += 1
        return self.buckets[self.next_bucket % len(self.buckets)]

    def _reduce_scatter(self, unit: Unit, buffer: Buffer, begin: int, n: int) -> None:
        """Sum elements `begin` to `begin + n` of this rank's gradients over ranks, from a packed buffer."""
        with self.stream.after_current():
            packed = buffer.local[: n * self.n_shards].view(self.n_shards, n)
            if not len(unit.grads):
                unit.grads = packed.new_empty(unit.length, dtype=self.reduce_dtype)
            overwrite = self.first or self.stage < 2
            grads = unit.grads[begin : begin + n]
            if self.n_shards == 1:
                received = packed
            elif self.reads_peers or self.n_shards <= MAX_EXCHANGE:
                # Sum after the exchange: as many bytes as a bf16 reduction, without its rounding.
                received = self._read_peers(buffer, n) if self.reads_peers else exchange(packed, self.shard_group)
            else:
                sent, name = packed.to(self.reduce_dtype).view(-1), self.shard_group.group_name
                part = collectives.reduce_scatter_tensor(sent, "sum", self.n_shards, name)
                received = collectives.wait_tensor(part)[None]
            self.sum_ranks(received, grads, overwrite)
            if self.last and self.copy_group.size() > 1:
                dist.all_reduce(grads, group=self.copy_group)
            self.in_flight.append(self.stream.event())

    def _read_peers(self, buffer: Any, n: int) -> Tensor:
        """Return all ranks' gradients of this rank's shard, (n_shards, n)."""
        received = buffer.local.new_empty(self.n_shards, n)
        buffer.barrier()
        for rank in (*buffer.others(), buffer.rank):
            received[rank].copy_(buffer.of(rank, buffer.rank * n, n))
        return received

    def finish(self) -> None:
        """Make the current stream wait for the reductions, and set the gradients of the shards."""
        self.early_unit = None
        if not self.in_graphs:
            self._join()
        for unit in chain.from_iterable(self.units):
            for start, shard in zip(unit.starts, unit.shards.values(), strict=True):
                shard.grad = unit.grads[start:][: shard.numel()].view(shard.shape)
            if not self.in_graphs:
                unit.grads, unit.accumulated = unit.grads.new_empty(0), unit.accumulated if self.reads_peers else None

    # --- streams

    def _join(self) -> None:
        self.stream.join()
        self.in_flight.clear()

    def end_update(self) -> None:
        """Join the early gather if the update is captured as a graph, which must end on one stream."""
        if self.in_graphs and self.early_unit is not None:
            self._join()
            self.early_unit.ready = None

    def _barrier(self) -> None:
        """Make the side stream wait for the current one and, if ranks read each other's memory, for all ranks'."""
        with self.stream.after_current():
            if self.flag is not None:
                self.flag.barrier()


def sum_ranks(received_RN: Tensor, total_N: Tensor, overwrite: bool) -> None:
    """Write the sum over ranks to `total_N`, or add it to that."""
    sums_N = received_RN.sum(0, dtype=total_N.dtype)
    total_N.copy_(sums_N if overwrite else total_N + sums_N)


def units_of(stage: Transformer) -> list[dict[str, nn.Module]]:
    """Return the modules of each unit by path, in forward order."""
    blocks = [{f"blocks.{layer}": block} for layer, block in stage.blocks.items()]
    ends = {name: getattr(stage, name) for name in ("embed", "norm", "head") if getattr(stage, name) is not None}
    if stage.norm is not None and stage.head is None:  # the embedding is the head
        return [ends, *blocks]
    first, last = ({name: ends[name] for name in names if name in ends} for names in (("embed",), ("norm", "head")))
    return [modules for modules in (first, *blocks, last) if modules]
