"""Sharded matrices, each put together by the one rank that owns it: one message to the owners, one back."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from parallel.shards import ParamShard


class Transfer(NamedTuple):
    """A shard of a matrix that one rank of the mesh sends to another."""

    number: int  # of the matrix
    source: int
    target: int
    rows: slice
    columns: slice


class WholeMatrices:
    """Exchanges the shards of matrices between all ranks that hold a part of them.

    Owners are chosen so that the sums of their `costs` are near each other; replicas share the work. Parameters that
    are not distributed are all this process's own. With `per_row` a matrix is one column, sharded as its parameter's
    rows are.
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
        for number, (param, owner) in enumerate(zip(params, owners, strict=True)):
            for rank, at in enumerate(coordinates):
                rows, columns = param.slices_at(at)
                if all(
                    at[axis] == coordinates[owner][axis] for axis in param.replicated_axes
                ):  # in the owner's replica
                    self.to_owners.append(Transfer(number, rank, owner, rows, columns))
                self.from_owners.append(Transfer(number, owner, rank, rows, columns))
        self.mine = [number for number, owner in enumerate(owners) if owner == self.rank]

    def gather(self, shards: Sequence[Tensor], *, per_row: bool = False) -> list[Tensor]:
        """Return the matrices that this rank owns, from all ranks' shards; a collective."""
        if not self.to_owners:
            return list(shards)
        wholes = {n: shards[n].new_empty(self.shapes[n][0], 1 if per_row else self.shapes[n][1]) for n in self.mine}
        sent = [(transfer, shards[transfer.number]) for transfer in self.to_owners if transfer.source == self.rank]
        for transfer, part in self._exchange(self.to_owners, sent, shards[0], per_row):
            wholes[transfer.number][_place(transfer, per_row)] = part
        return list(wholes.values())

    def scatter(self, wholes: Sequence[Tensor], shards: Sequence[Tensor], *, per_row: bool = False) -> list[Tensor]:
        """Return new shards of all matrices, in place of `shards`, from the matrices that each rank owns."""
        if not self.to_owners:
            return list(wholes)
        mine = dict(zip(self.mine, wholes, strict=True))
        its = [transfer for transfer in self.from_owners if transfer.source == self.rank]
        sent = [(transfer, mine[transfer.number][_place(transfer, per_row)]) for transfer in its]
        parts = {t.number: part for t, part in self._exchange(self.from_owners, sent, shards[0], per_row)}
        return [parts[number] for number in range(len(shards))]

    def _exchange(
        self, transfers: list[Transfer], sent: list[tuple[Transfer, Tensor]], like: Tensor, per_row: bool
    ) -> Iterator[tuple[Transfer, Tensor]]:
        """Send the tensors of this rank's transfers in one message, and yield what it receives."""
        sent = sorted(sent, key=lambda pair: pair[0].target)  # within a pair of ranks both keep the order of numbers
        received = sorted((t for t in transfers if t.target == self.rank), key=lambda t: t.source)
        shapes = [(t.rows.stop - t.rows.start, 1 if per_row else t.columns.stop - t.columns.start) for t in received]
        bytes_out, bytes_in = [0] * self.n_ranks, [0] * self.n_ranks
        for transfer, part in sent:
            bytes_out[transfer.target] += part.numel() * like.element_size()
        for transfer, (rows, columns) in zip(received, shapes, strict=True):
            bytes_in[transfer.source] += rows * columns * like.element_size()
        outgoing = torch.cat([like.new_empty(0), *(part.flatten().to(like.dtype) for _, part in sent)]).view(
            torch.uint8
        )
        incoming = like.new_empty(sum(rows * columns for rows, columns in shapes))
        # as bytes: gloo does not exchange every dtype
        dist.all_to_all_single(incoming.view(torch.uint8), outgoing, bytes_in, bytes_out, group=self.group)
        parts = incoming.split([rows * columns for rows, columns in shapes])
        for transfer, shape, part in zip(received, shapes, parts, strict=True):
            yield transfer, part.view(shape)


def _place(transfer: Transfer, per_row: bool) -> tuple[slice, slice]:
    return transfer.rows, slice(0, 1) if per_row else transfer.columns


def balance(costs: Sequence[int], n_ranks: int) -> tuple[list[int], int]:
    """Return an owner for each cost and the largest sum: the costliest first, each to the rank with the least."""
    loads, owners = [0] * n_ranks, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += costs[number]
    return owners, max(loads)


def group_of(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """Return a group of the ranks of a mesh, which alone make it; None: all ranks, the default group."""
    ranks = sorted(mesh.mesh.flatten().tolist())
    if len(ranks) == dist.get_world_size():
        return None
    group: Any = dist.new_group(ranks, use_local_synchronization=True)
    return group
