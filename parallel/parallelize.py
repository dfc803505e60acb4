"""What is done to a model before it is trained, by module path, in the one right order."""

import os
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from parallel.axes import stage_layers, stages_of
from parallel.config import (
    SPLIT_BACKWARD,
    ActivationCheckpointing,
    Compile,
    ParallelConfig,
    ParallelError,
    ReduceDtype,
    no_fp8,
)
from parallel.fp8 import MULTIPLE, Fp8Linear, cast_before_gathering
from parallel.mesh import Mesh
from parallel.tensor_parallel import apply_cp, apply_tp, divided_dim


def recomputed_blocks(n_blocks: int, config: ParallelConfig) -> int:
    """Count the blocks, from the first, whose activations are computed again in the backward pass."""
    match config.activation_checkpointing:
        case ActivationCheckpointing.none:
            return 0
        case ActivationCheckpointing.full:
            return n_blocks
        case ActivationCheckpointing.fraction:
            return round(n_blocks * config.activation_checkpointing_fraction)


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    config: ParallelConfig,
    dtype: torch.dtype,
    *,
    fp8: str = "none",
    grad_dtype: torch.dtype | None = None,
) -> list[nn.Module]:
    """Give a model built on the meta device its memory plan, its dtype and its place; weights are not set.

    The model keeps what is this rank's; what is given back runs it, piece by piece: itself, or its pipeline stages.
    Only parameters change dtype: rotary tables stay fp32. `fp8` is `none` or the name of a scaling;
    `grad_dtype` is what the gradients of micro-batches are added up in, if not `dtype`.
    """
    stages = split_stages(model, mesh, config)
    blocks = list(model.get_submodule("blocks").children())
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(param.to(dtype)))
    if mesh.param_mesh is not None and mesh.axes.tp > 1:
        apply_tp(model, mesh.param_mesh["tp"], sequence_parallel=config.sequence_parallel)
        if config.async_tp:
            overlap_tp(mesh.param_mesh["tp"])
    if fp8 != "none":
        check_fp8_device(fp8, mesh.device)
        apply_fp8(blocks, fp8)
    if mesh.batch_mesh is not None and mesh.axes.cp > 1:
        apply_cp(model, mesh.batch_mesh["cp"])
    for block in blocks[: recomputed_blocks(len(blocks), config)]:
        # The model has no randomness, so there is no generator state to replay.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    if compiles(config, mesh):
        compile_blocks(blocks)
    sharded = mesh.axes.dp * mesh.axes.cp > 1
    for stage in stages:
        if sharded:
            apply_zero(stage, mesh, config)
        stage.to_empty(device=mesh.device)
    if sharded:
        cast_before_gathering(model)
    # Where gradients are summed over ranks, they are added up in reduce_dtype.
    if grad_dtype is not None and grad_dtype != dtype and not sharded:
        for param in model.parameters():
            param.grad_dtype = grad_dtype  # type: ignore[attr-defined]
    return stages


def compiles(config: ParallelConfig, mesh: Mesh) -> bool:
    """Say whether blocks are compiled."""
    if config.compile is Compile.auto:
        split = mesh.axes.pp > 1 and config.pipeline_schedule in SPLIT_BACKWARD
        return mesh.device.type == "cuda" and not split
    return config.compile is Compile.blocks


def split_stages(model: Any, mesh: Mesh, config: ParallelConfig) -> list[nn.Module]:
    """Leave a model the layers of this pipeline rank, and give its stages, which share them."""
    if mesh.axes.pp == 1:
        return [model]
    model.untie_head()
    layers = stage_layers(config, mesh.axes, model.config.n_layers)
    mine = [layers[number] for number in stages_of(mesh.coordinate("pp"), mesh.axes.pp, config)]
    model.keep_layers([layer for stage in mine for layer in stage])
    return [model.make_stage(stage) for stage in mine]


def apply_fp8(blocks: list[nn.Module], scaling: str) -> None:
    """Let the blocks' matrix products, forward and backward, be computed in 8 bits; weights keep their dtype."""
    if scaling == "tensorwise":
        for module in (module for block in blocks for module in block.modules() if isinstance(module, nn.Linear)):
            weight = module.weight.to_local() if isinstance(module.weight, DTensor) else module.weight
            if any(size % MULTIPLE for size in weight.shape):
                raise ParallelError(
                    f"precision.fp8 (tensorwise) needs matrices whose sizes on a rank are multiples of {MULTIPLE}, not "
                    f"{weight.shape[0]} x {weight.shape[1]}; choose precision.fp8=none, or a smaller parallel.tp"
                )
            module.__class__ = Fp8Linear
        return
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # type: ignore[import-not-found]

    for block in blocks:
        convert_to_float8_training(block, config=Float8LinearConfig.from_recipe_name(scaling))


def check_fp8_device(scaling: str, device: torch.device) -> None:
    """Raise `ParallelError` if a device has no 8-bit products."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device
        raise no_fp8(scaling, str(where))


def overlap_tp(mesh: DeviceMesh) -> None:
    """Have the compiler cut products and their messages over tp into pieces that overlap.

    Both switches are private: torch has no other name for asynchronous tensor parallelism yet.
    """
    import torch._inductor.config as inductor_config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor: Any = inductor_config
    inductor._micro_pipeline_tp = True
    enable_symm_mem_for_group(mesh.get_group().group_name)


def compile_blocks(blocks: list[nn.Module], backend: str = "inductor") -> None:
    """Compile what stands around attention in each block: two graphs, compiled for the first and used by all."""
    # Restorable where the next run finds it, and a reboot does not remove it.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "torchinductor"))
    dynamo: Any = torch._dynamo.config
    # Each micro-batch shape of training and of validation is a graph of its own; none may fall back to eager code.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    for block in blocks:
        for part in ("project", "finish"):
            setattr(block, part, torch.compile(getattr(block, part), fullgraph=True, dynamic=False, backend=backend))


def apply_zero(model: nn.Module, mesh: Mesh, config: ParallelConfig) -> None:
    """Divide parameters over dp_shard, and sum gradients over it and dp_replicate; each block is gathered by itself.

    Both axes are given at any size, so that what accumulates over micro-batches is in `reduce_dtype`.
    """
    assert mesh.param_mesh is not None
    # A divided embedding's output is one; nothing is done to it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    dtypes = {ReduceDtype.bf16: torch.bfloat16, ReduceDtype.fp32: torch.float32}
    wrap = partial(
        fully_shard,
        mesh=mesh.param_mesh["dp_replicate", "dp_shard"],
        mp_policy=MixedPrecisionPolicy(reduce_dtype=dtypes[config.reduce_dtype], cast_forward_inputs=False),
    )
    embed, head = getattr(model, "embed", None), getattr(model, "head", None)
    tied = embed is not None and head is None and getattr(model, "norm", None) is not None
    blocks = list(model.get_submodule("blocks").children())
    parts = [*([] if embed is None or tied else [embed]), *blocks]
    for module in parts:
        wrap(module, reshard_after_forward=config.zero_stage == 3)
    wrap(model, reshard_after_forward=False)  # the head, which the backward pass needs at once
    if mesh.axes.pp > 1 and config.zero_stage == 3:
        # FSDP forgets the order of modules after a backward pass, and here other micro-batches are under way: each is
        # told which comes next, the last one itself, which is there.
        for module, following in pairwise([model, *reversed(parts), parts[0]]):
            module.set_modules_to_backward_prefetch([following])  # type: ignore[operator]
    for module in sharded_modules(model):
        # Losses are weighted by 1 / the step's targets, so gradients add up; nothing is averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def set_gradient_sync(model: nn.Module, zero_stage: int, *, last: bool) -> None:
    """Say what the backward pass of a micro-batch does with gradients and parameters, as the ZeRO stage has it."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or zero_stage >= 2)
        model.set_requires_all_reduce(last)
        model.set_reshard_after_backward(last or zero_stage == 3)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@torch.no_grad()
def write_shard(param: Tensor, whole: Tensor) -> None:
    """Set a parameter from the whole tensor that it is a part of, without talking to anybody."""
    if isinstance(param, DTensor):
        mesh = param.device_mesh
        for axis in reversed(range(mesh.ndim)):  # tp was divided first; dp_shard divides what is left
            dim = divided_dim(param.placements[axis])
            if dim is not None:
                length, size = whole.shape[dim], -(-whole.shape[dim] // mesh.size(axis))
                start = min(size * mesh.get_local_rank(axis), length)
                whole = whole.narrow(dim, start, min(size, length - start))
        param = param.to_local()
    param.copy_(whole)
