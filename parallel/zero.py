"""ZeRO: parameters, gradients and optimizer state sharded over data-parallel ranks, by explicit collectives.

A unit is a block, the embedding, or norm and head. Its parameters are views of one flat buffer that holds, parameter by
parameter, the ranks' equal shares of rows, so that a gather writes every parameter where it is read. Gradients are
packed rank by rank and sent to the rank that owns each share. Collectives run on a stream of their own:

    stage 0     gradients are summed over all ranks
    stage 1     gradients are accumulated whole and sent once per step; weights are gathered once, as the forward pass
                of the next step comes to them
    stage 2     gradients are sent after each micro-batch, while the backward pass goes on
    stage 3     weights too are gathered as the passes come to them, and freed after
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
from parallel.peers import Buffer, SharedBuffer, SideStream, can_share
from parallel.shards import ALIGNMENT, matrices_first
from parallel.tensor_parallel import collectives, exchange

# Above it a message to each rank would be short, and ranks are on several nodes: their sums travel as they are made.
MAX_EXCHANGE = 8  # ranks


class Unit:
    """Parameters that are gathered and reduced together: those of some modules, as views of one flat buffer."""

    def __init__(
        self,
        modules: dict[str, nn.Module],
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        frees: bool,
        copies: bool,
    ) -> None:
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
        # of each parameter: numbers per share, padding of the last rows included, and where its shares begin
        self.sizes = [-(-shape[0] // n_shards) * shape[1:].numel() for shape in shapes]
        self.starts, self.length = [], 0
        for size in self.sizes:
            self.starts.append(self.length)
            self.length += -(-size // ALIGNMENT) * ALIGNMENT
        n_kept = self.length if frees else self.length * n_shards  # between steps
        shared = SharedBuffer(n_kept, self.dtype, device, group) if copies else None
        kept = torch.empty(n_kept, dtype=self.dtype, device=device) if shared is None else shared.mine
        self.whole = torch.empty(self.length * n_shards, dtype=self.dtype, device=device) if frees else kept
        self.n_bytes = self.whole.untyped_storage().nbytes()
        self.params: list[nn.Parameter] = []  # whole over data-parallel ranks, as the model reads them
        self.shards: dict[str, Tensor] = {}  # this rank's, as the optimizer updates them
        # flat, of each parameter: the whole with padding, and this rank's share of it
        self.wholes: list[Tensor] = []
        self.mine: list[Tensor] = []
        self.copies: list[tuple[Tensor, Tensor]] = []  # to, from: what copy engines gather
        layout = zip(owners.items(), shapes, self.sizes, self.starts, strict=True)
        for (name, (owner, leaf, _)), shape, size, start in layout:
            whole = self.whole[start * n_shards :][: size * n_shards]
            mine = kept[start:][:size] if frees else whole[size * rank :][:size]
            param = nn.Parameter(whole[: shape.numel()].view(shape))
            setattr(owner, leaf, param)
            n_numbers = max(0, min(size, shape.numel() - size * rank))  # without padding
            self.params.append(param)
            self.shards[name] = mine[:n_numbers].view(-1, *shape[1:])
            self.wholes.append(whole)
            self.mine.append(mine)
            if shared is not None:
                for peer in shared.others():
                    at = start if frees else start * n_shards + size * peer
                    self.copies.append((whole[size * peer :][:size], shared.of(peer, at, size)))
                if frees:
                    self.copies.append((whole[size * rank :][:size], mine))
        self.is_gathered = not frees  # its memory is there, and what fills it is under way
        self.ready: Any = None  # event after which the parameters may be read
        self.accumulated: Buffer | None = None  # whole gradients of the micro-batches so far
        self.grads = kept.new_empty(0)  # of this rank's shares, summed over ranks
        self.missing = 0  # gradients that the backward pass has yet to compute
        self.begins = False  # one of the first two: needed when a forward pass begins
        self.begins = False  # one of the first two: needed when a forward pass begins
        self.before: Unit | None = None  # whose backward pass comes next
        self.after: Unit | None = None

    def pack(self, grads: list[Tensor], out: Tensor, begin: int) -> None:
        """Write shares of gradients from `begin` on to `out`, (n_shards, n): a row for each rank."""
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
        """Move the gradients to `out`, or add them: it lies as in `pack`, and has zeros between them."""
        for flat, size, start in zip(self.take_grads(), self.sizes, self.starts, strict=True):
            part = out[:, start : start + size]
            part.copy_(flat) if first else part.add_(flat)

    def take_grads(self) -> Iterator[Tensor]:
        """Yield the gradients as (n_shards, size), padding included, and drop them."""
        for param, size in zip(self.params, self.sizes, strict=True):
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            flat, param.grad = grad.reshape(-1), None
            padding = size * self.n_shards - len(flat)
            yield (F.pad(flat, (0, padding)) if padding else flat).view(self.n_shards, size)

    def set_shard_grads(self) -> None:
        for start, shard in zip(self.starts, self.shards.values(), strict=True):
            shard.grad = self.grads[start:][: shard.numel()].view(shard.shape)

    def resize(self, n_bytes: int) -> None:
        self.is_gathered = n_bytes > 0
        self.whole.untyped_storage().resize_(n_bytes)


class Zero:
    """Gathers and frees the parameters of a model's stages, and reduces their gradients."""

    def __init__(
        self, stages: Sequence[Transformer], mesh: Mesh, config: ParallelConfig, grad_dtype: torch.dtype
    ) -> None:
        assert mesh.param_mesh is not None
        self.stage, self.device = config.zero_stage, mesh.device
        self.shard_group, self.copy_group = (mesh.param_mesh.get_group(axis) for axis in ("dp_shard", "dp_replicate"))
        self.n_shards = self.shard_group.size()
        self.frees = self.stage == 3 and self.n_shards > 1
        self.grad_dtype = grad_dtype  # of whole gradients, as micro-batches add to them
        self.reduce_dtype = torch.float32 if config.reduce_dtype is ReduceDtype.fp32 else torch.bfloat16
        # Within a node weights and gradients are read by copy engines, which leave all multiprocessors to products.
        self.copies = can_share(self.shard_group, mesh.device)
        if self.copies:
            self.flag = SharedBuffer(1, torch.int32, mesh.device, self.shard_group)
        self.stream = SideStream(mesh.device)
        self.units: list[list[Unit]] = []  # of each stage, in the order of the forward pass
        for stage in stages:
            its = [
                Unit(modules, self.shard_group, self.device, frees=self.frees, copies=self.copies)
                for modules in units_of(stage)
            ]
            self.units.append(its)
            for unit in its:
                self._hook(unit)
            for unit in its[:2]:
                unit.begins = True
            for unit in its[:2]:
                unit.begins = True
            for one, other in pairwise(its):
                one.after, other.before = other, one
        self.pending: list[Unit] = []  # of a backward pass, whose gradients are still to come; the next one is last
        self.first = self.last = True
        self.early: Unit | None = None  # gathered while the rest was updated
        # Where steps are graphs, each ends on one stream, and gradients stay in the same memory.
        self.joins = False
        self.in_flight: deque[Any] = deque()  # events after messages that may not have arrived yet
        # Gradients on their way, those of a block or fewer: one is written while others are being read.
        self.outboxes: deque[Buffer] = deque()
        self.add_up = torch.compile(add_up, dynamic=True) if config.compiles(mesh.device.type) else add_up
        blocks = [unit.length for unit in chain.from_iterable(self.units) if unit.is_block]
        self.outbox_length = max(blocks)

    @property
    def shards(self) -> dict[str, Tensor]:
        """This rank's shards of the stages' parameters, by name."""
        return {name: shard for units in self.units for unit in units for name, shard in unit.shards.items()}

    def _hook(self, unit: Unit) -> None:
        for shard in unit.shards.values():
            shard.grad_dtype = self.reduce_dtype  # type: ignore[attr-defined]
        for param in unit.params:
            param.register_post_accumulate_grad_hook(lambda _: self._count(unit))
        for module in unit.modules.values():
            module.register_forward_pre_hook(lambda *_: self._need(unit, unit.after))
        if not self.frees:
            return
        unit.resize(0)
        if "norm" not in unit.modules:  # which the head needs, and at once the backward pass
            (module,) = unit.modules.values()
            module.register_forward_hook(lambda _module, _inputs, output: self._leave(unit, output))

    # --- gathering

    def gather(self) -> None:
        """Start to gather the parameters that are kept whole, in the order in which a forward pass needs them."""
        if self.copies:
            with self.stream.beside():  # all ranks have updated their shards
                self._barrier()
        if self.n_shards > 1 and not self.frees:
            for unit in chain.from_iterable(self.units):
                if unit is not self.early:
                    self._gather(unit)
        self.early = None
        if self.joins:
            self.free()  # what replayed graphs left gathered is of another step

    def gather_early(self, updated: Collection[str]) -> None:
        """Start to gather the unit that the next step needs at once, if its shards are among the updated ones."""
        first = self.units[0][0]
        if self.copies and not self.frees and self.early is None and first.shards.keys() <= set(updated):
            with self.stream.beside():
                self._barrier()
            self._gather(first)
            self.early = first

    def _gather(self, unit: Unit) -> None:
        if not unit.is_gathered:
            unit.resize(unit.n_bytes)
        # What a backward pass reads is what the forward pass read, gathered again.
        autograd: Any = torch.autograd
        with self.stream.beside(), autograd._unsafe_preserve_version_counter(unit.whole):
            self._all_gather(unit)
        unit.ready = self.stream.event()

    def _all_gather(self, unit: Unit) -> None:
        if self.copies:
            for whole, part in unit.copies:
                whole.copy_(part)
            return
        self.shard_group.allgather_into_tensor_coalesced(unit.wholes, unit.mine).wait()

    def _need(self, unit: Unit, next_: Unit | None) -> None:
        """Let the device wait until a unit's parameters are there, while those needed next are under way."""
        if not unit.is_gathered:
            self._gather(unit)
        self.stream.wait(unit.ready)
        unit.ready = None
        if next_ is not None and not next_.is_gathered:
            self._gather(next_)

    def _leave(self, unit: Unit, output: Any) -> None:
        """Free a unit's parameters after its forward pass, and have them gathered for its backward pass."""
        x = output[0] if isinstance(output, tuple) else output
        if unit.is_block and x.requires_grad:
            before = unit.before if unit.before and unit.before.is_block else None
            x.register_hook(lambda _: self._need(unit, before))
            if unit.after and not unit.after.is_block:
                return  # the backward pass begins with this block
        self._free(unit)

    def free(self) -> None:
        """Free what the passes gathered, as far as the ZeRO stage does."""
        self.last = True
        for unit in chain.from_iterable(self.units):
            self._free(unit)

    # --- reducing

    def begin_backward(self, stage: int, *, first: bool, last: bool) -> None:
        """Prepare for a stage's backward pass of the first or last of a step's micro-batches, or of one between."""
        self.pending = list(self.units[stage])
        self.first, self.last = first, last
        for unit in self.pending:
            unit.missing = len(unit.params)

    def end_backward(self) -> None:
        """Take the gradients that the pass did not compute, as zeros."""
        while self.pending:
            self._take(self.pending.pop())
        if self.joins:
            with self.stream.beside():
                self._barrier()  # the next replay of a graph writes into the same outboxes
            self._join()

    def _count(self, unit: Unit) -> None:
        unit.missing -= 1
        while self.pending and self.pending[-1].missing == 0:  # in one order on all ranks
            self._take(self.pending.pop())

    def _take(self, unit: Unit) -> None:
        """Take a unit's gradients of a micro-batch, and send them to the ranks that own them if it is time."""
        if self.stage < 2 and not (self.first and self.last):
            if unit.accumulated is None:
                unit.accumulated = self._buffer(unit.length, unit.whole, self.grad_dtype)
            unit.accumulate(unit.accumulated.mine.view(self.n_shards, -1), first=self.first)
            if self.last:
                self._send(unit, unit.accumulated, 0, unit.length)
        else:
            grads = list(unit.take_grads())
            for begin in range(0, unit.length, self.outbox_length):
                n = min(self.outbox_length, unit.length - begin)
                outbox = self._next_outbox(unit)
                unit.pack(grads, outbox.mine[: n * self.n_shards].view(self.n_shards, n), begin)
                self._send(unit, outbox, begin, n)
        self._free(unit)

    def _free(self, unit: Unit) -> None:
        """Free a unit's parameters, but for those with which the next micro-batch begins."""
        if not self.frees or (unit.begins and not self.last):
            return
        if unit.begins and self.joins:
            unit.is_gathered = False  # graphs have recorded where it lies
        else:
            unit.resize(0)

    def _buffer(self, length: int, like: Tensor, dtype: torch.dtype) -> Buffer:
        """Return zeros for shares of packed gradients, which other ranks can read if they are on this node."""
        if not self.copies:
            return Buffer(like.new_zeros(length * self.n_shards, dtype=dtype))
        buffer = SharedBuffer(length * self.n_shards, dtype, self.device, self.shard_group)
        buffer.mine.zero_()
        return buffer

    def _next_outbox(self, unit: Unit) -> Buffer:
        """Return the outbox that was sent three messages ago, which has been read: a barrier came after it."""
        while len(self.in_flight) > 1:
            self.stream.wait(self.in_flight.popleft())
        if not self.outboxes:
            self.outboxes = deque(self._buffer(self.outbox_length, unit.whole, unit.dtype) for _ in range(3))
        self.outboxes.rotate()
        return self.outboxes[0]

    def _send(self, unit: Unit, buffer: Buffer, begin: int, n: int) -> None:
        """Sum a unit's packed gradients over ranks: `n` of this rank's share, from `begin` on."""
        with self.stream.beside():
            packed = buffer.mine[: n * self.n_shards].view(self.n_shards, n)
            if not len(unit.grads):
                unit.grads = packed.new_empty(unit.length, dtype=self.reduce_dtype)
            begins = self.first or self.stage < 2
            grads = unit.grads[begin : begin + n]
            if self.n_shards == 1:
                received = packed
            elif self.copies or self.n_shards <= MAX_EXCHANGE:
                # As few bytes as bf16 sums would take, and none is rounded.
                sent = packed if packed.element_size() <= self.reduce_dtype.itemsize else packed.to(self.reduce_dtype)
                received = self._read_peers(buffer, n) if self.copies else exchange(sent, self.shard_group)
            else:
                sent, name = packed.to(self.reduce_dtype).view(-1), self.shard_group.group_name
                part = collectives.reduce_scatter_tensor(sent, "sum", self.n_shards, name)
                received = collectives.wait_tensor(part)[None]
            self.add_up(received, grads, begins)
            if self.last and self.copy_group.size() > 1:
                dist.all_reduce(grads, group=self.copy_group)
            self.in_flight.append(self.stream.event())

    def _read_peers(self, buffer: Any, n: int) -> Tensor:
        """Return every rank's gradients of this rank's share, (n_shards, n)."""
        received = buffer.mine.new_empty(self.n_shards, n)
        buffer.barrier()
        for rank in (*buffer.others(), buffer.rank):
            received[rank].copy_(buffer.of(rank, buffer.rank * n, n))
        return received

    def finish(self) -> None:
        """Wait, on the device, for the step's gradients, and set them on the shards."""
        if not self.joins:
            self._join()
        for unit in chain.from_iterable(self.units):
            unit.set_shard_grads()
            if not self.joins:
                unit.grads, unit.accumulated = unit.grads.new_empty(0), unit.accumulated if self.copies else None

    # --- streams

    def _join(self) -> None:
        self.stream.join()
        self.in_flight.clear()

    def end_update(self) -> None:
        """Wait, on the device, for what was gathered early, if the update is a graph: it must end on one stream."""
        if self.joins and self.early is not None:
            self._join()
            self.early.ready = None

    def _barrier(self) -> None:
        """Let the current stream wait until all ranks' streams are here, if they read each other's memory."""
        if self.copies:
            self.flag.barrier()


def add_up(received_RN: Tensor, total_N: Tensor, begins: bool) -> None:
    """Write the sum over ranks to `total_N`, or add it."""
    sums_N = received_RN.sum(0, dtype=total_N.dtype)
    total_N.copy_(sums_N if begins else total_N + sums_N)


def units_of(stage: Transformer) -> list[dict[str, nn.Module]]:
    """Return the modules of each unit by path, in the order of the forward pass; those of one unit stay gathered."""
    blocks = [{f"blocks.{layer}": block} for layer, block in stage.blocks.items()]
    ends = {name: getattr(stage, name) for name in ("embed", "norm", "head") if getattr(stage, name) is not None}
    if stage.norm is not None and stage.head is None:  # the embedding is the head
        return [ends, *blocks]
    first, last = ({name: ends[name] for name in names if name in ends} for names in (("embed",), ("norm", "head")))
    return [modules for modules in (first, *blocks, last) if modules]
