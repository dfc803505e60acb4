"""Shards of parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

ALIGNMENT = 8  # elements: kernels need matrices at multiples of 16 bytes


@dataclass(eq=False, slots=True)
class ParamShard:
    """This rank's shard of a parameter, a plain tensor whose `.grad` is set once gradients are reduced.

    `shape` is the full parameter's. Without a mesh the shard is the full parameter.
    """

    shard: Tensor
    shape: torch.Size
    mesh: DeviceMesh | None = None
    placements: tuple[Placement, ...] = ()

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def grad(self) -> Tensor | None:
        return self.shard.grad

    def numel(self) -> int:
        """Return the number of elements of the full parameter."""
        return prod(self.shape)

    @property
    def replicated_axes(self) -> list[int]:
        """The mesh axes along which shards are equal."""
        return [axis for axis, placement in enumerate(self.placements) if sharded_dim(placement) is None]

    @property
    def is_first_copy(self) -> bool:
        """Whether this rank is the first of those with the same shard."""
        return self.mesh is None or all(self.mesh.get_local_rank(axis) == 0 for axis in self.replicated_axes)

    def slices_at(self, coordinate: Sequence[int] | None) -> tuple[slice, ...]:
        """Return the slices of the full parameter that the rank at a mesh coordinate has."""
        bounds = [(0, size) for size in self.shape]
        if self.mesh is not None:
            assert coordinate is not None
            for axis in reversed(range(self.mesh.ndim)):  # tp splits first, then dp_shard
                dim = sharded_dim(self.placements[axis])
                if dim is not None:
                    start, stop = bounds[dim]
                    size = -(-(stop - start) // self.mesh.size(axis))
                    start = min(start + size * coordinate[axis], stop)
                    bounds[dim] = start, min(start + size, stop)
        return tuple(slice(*bound) for bound in bounds)

    def take(self, full: Tensor) -> Tensor:
        """Return this rank's part of the full tensor, as a view."""
        return full[self.slices_at(None if self.mesh is None else self.mesh.get_coordinate())]

    @torch.no_grad()
    def write(self, full: Tensor) -> None:
        """Set this rank's shard from the full tensor, without communication."""
        self.shard.copy_(self.take(full))

    def laid_out(self, shard: Tensor) -> Tensor:
        """Return a tensor of the shard's shape, on any device, as a DTensor in the parameter's layout.

        A tensor of one column is sharded like the parameter's rows.
        """
        if self.mesh is None:
            return shard
        shape, placements = self.shape, self.placements
        if shard.shape != self.shard.shape:
            shape = torch.Size((shape[0], 1))
            placements = tuple(Replicate() if sharded_dim(place) == 1 else place for place in placements)
        stride = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
        spec: Any = DTensorSpec(self.mesh, placements, tensor_meta=TensorMeta(shape, stride, shard.dtype))
        return DTensor(shard, spec, requires_grad=False)


def whole_params(module: nn.Module) -> dict[str, ParamShard]:
    """Return the parameters of a module that is not distributed."""
    return {name: ParamShard(param, param.shape) for name, param in module.named_parameters()}


def sharded_dim(placement: Placement) -> int | None:
    """Return the dimension that a placement shards, or None; not every such class is a subclass of `Shard`."""
    return getattr(placement, "dim", None)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def matrices_first(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return a module's parameters, vectors last, so that weights with the same input are adjacent in a flat buffer."""
    return sorted(module.named_parameters(), key=lambda named: named[1].ndim == 1)
