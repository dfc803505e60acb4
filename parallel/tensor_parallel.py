"""Tensor parallelism by the model's own plan, and context parallelism, which splits the tokens of a sequence."""

from collections.abc import Callable, Sequence
from functools import partial
from math import lcm
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from model.transformer import Transformer


def apply_tp(model: Transformer, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    """Split a model over tp as its `tp_plan` says.

    colwise: outputs are split; rowwise: inputs are split, so that outputs are sums over tp (a bias is added once);
    norm: the weight is replicated and the output gathered. Between them stand plain tensors: all tokens, or this rank's
    under sequence parallelism.
    """
    between: Placement = Shard(1) if sequence_parallel else Replicate()
    rowwise = RowwiseParallel(output_layouts=between)
    styles = {"colwise": ColwiseParallel(), "rowwise": rowwise, "norm": _GatheringNorm(between)}
    plan: dict[str, ParallelStyle] = {path: styles[style] for path, style in model.tp_plan().items()}
    if "embed" in plan:  # the vocabulary is the input of a lookup
        plan["embed"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
    parallelize_module(model, mesh, plan)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_dim(placement: Placement) -> int | None:
    """Return the dimension that a placement shards; FSDP has kinds of `Shard` that are not subclasses of it."""
    return getattr(placement, "dim", None)


def shard_slices(param: DTensor, coordinate: Sequence[int] | None) -> tuple[slice, ...]:
    """Return where the shard of the rank at a coordinate of the parameter's mesh lies in the whole tensor."""
    assert coordinate is not None
    mesh, bounds = param.device_mesh, [(0, size) for size in param.shape]
    for axis in reversed(range(mesh.ndim)):  # tp was applied first; dp_shard splits what is left
        dim = sharded_dim(param.placements[axis])
        if dim is not None:
            start, stop = bounds[dim]
            size = -(-(stop - start) // mesh.size(axis))
            start = min(start + size * coordinate[axis], stop)
            bounds[dim] = start, min(start + size, stop)
    return tuple(slice(*bound) for bound in bounds)


class _GatheringNorm(ParallelStyle):
    """Norm this rank's tokens and gather all of them as a DTensor, so that their gradients are summed over tp once."""

    def __init__(self, between: Placement) -> None:
        self.between = between

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, None, self._enter, self._leave)  # type: ignore[arg-type]

    def _enter(self, _module: nn.Module, inputs: tuple[Tensor], mesh: DeviceMesh) -> tuple[DTensor]:
        return (DTensor.from_local(inputs[0], mesh, [self.between], run_check=False),)

    def _leave(self, _module: nn.Module, output: DTensor, _mesh: DeviceMesh) -> DTensor:
        return output.redistribute(placements=[Replicate()])


class VocabularyShard:
    """This rank's rows of the head, and reductions over all ranks' rows, for the loss."""

    def __init__(self, mesh: DeviceMesh, n_vocab: int) -> None:
        self.n_vocab, self.group = n_vocab, mesh.get_group()
        self.first = n_vocab // mesh.size() * mesh.get_local_rank()

    def max_(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)

    def sum_(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=self.group)


def local_head(h_BTD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor, VocabularyShard | None]:
    """Return the loss's inputs as plain tensors: all tokens, and this rank's rows of the vocabulary."""
    if not isinstance(weight_VD, DTensor):
        return h_BTD, weight_VD, None
    assert isinstance(h_BTD, DTensor)
    shard = VocabularyShard(weight_VD.device_mesh, weight_VD.shape[0])
    # The gradient through a rank's own rows is a partial sum.
    return h_BTD.to_local(grad_placements=[Partial()]), weight_VD.to_local(grad_placements=[Shard(0)]), shard


def apply_cp(model: Transformer, mesh: DeviceMesh) -> None:
    """Let each rank attend to whole sequences with a part of the heads (Ulysses, arXiv:2309.14509)."""
    for block in model.blocks.values():
        block.attend = partial(_ulysses, block.attend, mesh.get_group())  # type: ignore[assignment]


def _ulysses(
    attend: Callable[..., Tensor], group: dist.ProcessGroup, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any
) -> Tensor:
    size, n_kv_heads = group.size(), k.shape[2]
    if n_kv_heads % size:  # each rank needs the key-value heads of its queries
        k, v = (x.repeat_interleave(lcm(n_kv_heads, size) // n_kv_heads, dim=2) for x in (k, v))
    q, k, v = (_all_to_all(x, group, split_dim=2, cat_dim=1) for x in (q, k, v))
    return _all_to_all(attend(q, k, v, **kwargs), group, split_dim=1, cat_dim=2)


def _all_to_all(x: Tensor, group: dist.ProcessGroup, *, split_dim: int, cat_dim: int) -> Tensor:
    """Send chunk i of `split_dim` to rank i, and concatenate the chunks received along `cat_dim`."""
    from torch.distributed._functional_collectives import all_to_all_single_autograd

    chunks = torch.stack(x.chunk(group.size(), split_dim))
    # The public all_to_all_single has no gradient; this one is what DTensor uses.
    received: Any = all_to_all_single_autograd(chunks.flatten(), None, None, group)
    return torch.cat(received.view_as(chunks).unbind(), cat_dim)
