"""What is done to a model before it is trained, by module path, in the one right order."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from parallel.config import ActivationCheckpointing, ParallelConfig, ReduceDtype
from parallel.mesh import Mesh


def recomputed_blocks(n_blocks: int, config: ParallelConfig) -> int:
    """Count the blocks, from the first, whose activations are computed again in the backward pass."""
    match config.activation_checkpointing:
        case ActivationCheckpointing.none:
            return 0
        case ActivationCheckpointing.full:
            return n_blocks
        case ActivationCheckpointing.fraction:
            return round(n_blocks * config.activation_checkpointing_fraction)


def parallelize(model: nn.Module, mesh: Mesh, config: ParallelConfig, dtype: torch.dtype) -> None:
    """Give a model built on the meta device its memory plan, its dtype and its place; weights are not set.

    Only parameters change dtype: rotary tables stay fp32.
    """
    blocks = list(model.get_submodule("blocks").children())
    for block in blocks[: recomputed_blocks(len(blocks), config)]:
        # The model has no randomness, so there is no generator state to replay.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(param.to(dtype)))
    if mesh.axes.dp * mesh.axes.cp > 1:
        shard(model, mesh, config)
    model.to_empty(device=mesh.device)


def shard(model: nn.Module, mesh: Mesh, config: ParallelConfig) -> None:
    """Divide parameters over dp_shard and sum gradients over it and dp_replicate: a group a block, the embedding, the rest.

    The mesh has both axes at any size, so that what accumulates over micro-batches is in `reduce_dtype`.
    """
    assert mesh.layout is not None
    dtypes = {ReduceDtype.bf16: torch.bfloat16, ReduceDtype.fp32: torch.float32}
    wrap = partial(
        fully_shard,
        mesh=mesh.layout["dp_replicate", "dp_shard"],
        mp_policy=MixedPrecisionPolicy(reduce_dtype=dtypes[config.reduce_dtype], cast_forward_inputs=False),
        reshard_after_forward=config.zero_stage == 3,
    )
    embed, head = getattr(model, "embed", None), getattr(model, "head", None)
    for module in [*model.get_submodule("blocks").children(), *([embed] if embed and head else [])]:
        wrap(module)
    wrap(model, reshard_after_forward=False)  # the head, which the backward pass needs at once
    for module in sharded_modules(model):
        # Losses are weighted by 1 / the step's targets, so gradients add up; nothing is averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@torch.no_grad()
def write_shard(param: Tensor, whole: Tensor) -> None:
    """Set a parameter from the whole tensor it is a part of, without talking to anybody."""
    if not isinstance(param, DTensor):
        param.copy_(whole)
        return
    mesh = param.device_mesh
    # The last axis (tp) was divided first; dp_shard divides what is left.
    for axis in reversed(range(mesh.ndim)):
        placement = param.placements[axis]
        if placement.is_shard():
            assert isinstance(placement, Shard) or hasattr(placement, "dim")
            dim, size = placement.dim, mesh.size(axis)  # type: ignore[attr-defined]
            per_rank = -(-whole.shape[dim] // size)
            start = min(per_rank * mesh.get_local_rank(axis), whole.shape[dim])
            whole = whole.narrow(dim, start, min(per_rank, whole.shape[dim] - start))
    param.to_local().copy_(whole)
