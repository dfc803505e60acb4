"""Exchange of sharded matrices: each is gathered by one rank, its owner, and scattered back."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from parallel.shards import ParamShard


class Transfer(NamedTuple):
    """A shard of a matrix that one rank sends to another."""

    index: int  # of the matrix
    source: int
    target: int
    rows: slice
    columns: slice


class WholeMatrices:
    """Gathers matrices on their owners and scatters them back, over all ranks of a mesh.

    Owners are chosen to balance the sums of `costs`, across replicas too. Without a mesh this process owns all
    matrices. With `per_row`, a matrix is one column, sharded like its parameter's rows.
    """

    def __init__(self, params: Sequence[ParamShard], costs: Sequence[int], group: dist.ProcessGroup | None) -> None:
        self.group, self.shapes, self.rank, self.n_ranks = group, [tuple(param.shape) for param in params], 0, 1
        self.to_owners: list[Transfer] = []
        self.from_owners: list[Transfer] = []
        coordinates: list[tuple[int, ...]] = []
        mesh = params[0].mesh
        if mesh is not None:
            coordinates = list(product(*map(range, mesh.shape)))
            self.n_ranks, self.rank = len(coordinates), coordinates.index(tuple(mesh.get_coordinate() or ()))
        owners, self.largest_cost = balance(costs, self.n_ranks)
        for index, (param, owner) in enumerate(zip(params, owners, strict=True)):
            for rank, coordinate in enumerate(coordinates):
                rows, columns = param.slices_at(coordinate)
                in_replica = (coordinate[axis] == coordinates[owner][axis] for axis in param.replicated_axes)
                if all(in_replica):  # in that of the owner
                    self.to_owners.append(Transfer(index, rank, owner, rows, columns))
                self.from_owners.append(Transfer(index, owner, rank, rows, columns))
        self.mine = [index for index, owner in enumerate(owners) if owner == self.rank]

    def gather(self, shards: Sequence[Tensor], *, per_row: bool = False) -> list[Tensor]:
        """Return the matrices that this rank owns, from all ranks' shards; a collective."""
        if not self.to_owners:
            return list(shards)
        full = {n: shards[n].new_empty(self.shapes[n][0], 1 if per_row else self.shapes[n][1]) for n in self.mine}
        for transfer, part in self._exchange(self.to_owners, lambda t: shards[t.index], shards[0], per_row):
            full[transfer.index][_slices(transfer, per_row)] = part
        return list(full.values())

    def scatter(self, full: Sequence[Tensor], shards: Sequence[Tensor], *, per_row: bool = False) -> list[Tensor]:
        """Return new shards of all matrices, like `shards`, from the full matrices of their owners; a collective."""
        if not self.to_owners:
            return list(full)
        owned = dict(zip(self.mine, full, strict=True))

        def part_of(transfer: Transfer) -> Tensor:
            return owned[transfer.index][_slices(transfer, per_row)]

        parts = {t.index: part for t, part in self._exchange(self.from_owners, part_of, shards[0], per_row)}
        return [parts[index] for index in range(len(shards))]

    def _exchange(
        self, transfers: list[Transfer], part_of: Callable[[Transfer], Tensor], like: Tensor, per_row: bool
    ) -> Iterator[tuple[Transfer, Tensor]]:
        """Send the parts of this rank's transfers in one all-to-all, and yield those received."""
        # A stable order, so that sender and receiver agree
        sent = sorted((t for t in transfers if t.source == self.rank), key=lambda t: t.target)
        received = sorted((t for t in transfers if t.target == self.rank), key=lambda t: t.source)
        shapes = [(t.rows.stop - t.rows.start, 1 if per_row else t.columns.stop - t.columns.start) for t in received]
        sizes, parts = list(map(prod, shapes)), [part_of(t).flatten().to(like.dtype) for t in sent]
        bytes_out, bytes_in = [0] * self.n_ranks, [0] * self.n_ranks
        for transfer, part in zip(sent, parts, strict=True):
            bytes_out[transfer.target] += part.nbytes
        for transfer, size in zip(received, sizes, strict=True):
            bytes_in[transfer.source] += size * like.element_size()
        outgoing, incoming = torch.cat([like.new_empty(0), *parts]), like.new_empty(sum(sizes))
        # as bytes, because gloo does not support every dtype
        as_bytes = incoming.view(torch.uint8), outgoing.view(torch.uint8)
        dist.all_to_all_single(*as_bytes, bytes_in, bytes_out, group=self.group)
        for transfer, shape, part in zip(received, shapes, incoming.split(sizes), strict=True):
            yield transfer, part.view(shape)


def _slices(transfer: Transfer, per_row: bool) -> tuple[slice, slice]:
    return transfer.rows, slice(0, 1) if per_row else transfer.columns


def balance(costs: Sequence[int], n_ranks: int) -> tuple[list[int], int]:
    """Assign costs to ranks, largest first, each to the least loaded; return the ranks and the largest load."""
    loads, owners = [0] * n_ranks, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners, max(loads)


def group_of(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """Return a new group of a mesh's ranks, created by them alone; None for all ranks."""
    ranks = sorted(mesh.mesh.flatten().tolist())
    if len(ranks) == dist.get_world_size():
        return None
    group: Any = dist.new_group(ranks, use_local_synchronization=True)
    return group
