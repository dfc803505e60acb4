"""What is done to a model before it is trained, in the one right order."""

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

from model.transformer import Transformer
from parallel.axes import stage_layers, stages_of
from parallel.config import SPLIT_BACKWARD, Compile, ParallelConfig, ParallelError, ReduceDtype, no_fp8
from parallel.fp8 import MULTIPLE, Fp8Linear, cast_before_gathering
from parallel.mesh import Mesh
from parallel.tensor_parallel import apply_cp, apply_tp, local, shard_slices


def recomputed_blocks(n_blocks: int, config: ParallelConfig) -> int:
    """Return how many blocks, from the first, recompute their activations in the backward pass."""
    fraction = {"none": 0.0, "full": 1.0, "fraction": config.activation_checkpointing_fraction}
    return round(n_blocks * fraction[config.activation_checkpointing.value])


def parallelize(
    model: Transformer,
    mesh: Mesh,
    config: ParallelConfig,
    dtype: torch.dtype,
    *,
    fp8: str = "none",
    grad_dtype: torch.dtype | None = None,
) -> list[Transformer]:
    """Lay out a model that was built on the meta device, and allocate it; returns its stages, which run it.

    The model keeps this rank's parameters, not initialised. `fp8` is `none` or the name of a scaling; `grad_dtype`
    accumulates the gradients of micro-batches, if it is not `dtype`.
    """
    stages = split_stages(model, mesh, config)
    blocks = list(model.blocks.values())
    for module in model.modules():  # not model.to(): a dry run's tensors cannot be swapped
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
        # The model has no randomness, so there is no generator state to restore.
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
    elif grad_dtype is not None and grad_dtype != dtype:  # sharded gradients are accumulated in reduce_dtype
        for param in model.parameters():
            param.grad_dtype = grad_dtype  # type: ignore[attr-defined]
    return stages


def compiles(config: ParallelConfig, mesh: Mesh) -> bool:
    """Return whether blocks are compiled."""
    if config.compile is Compile.auto:
        split = mesh.axes.pp > 1 and config.pipeline_schedule in SPLIT_BACKWARD
        return mesh.device.type == "cuda" and not split
    return config.compile is Compile.blocks


def split_stages(model: Transformer, mesh: Mesh, config: ParallelConfig) -> list[Transformer]:
    """Leave a model the layers of this pipeline rank, and return its stages, which share their parameters."""
    if mesh.axes.pp == 1:
        return [model]
    model.untie_head()
    layers = stage_layers(config, mesh.axes, model.config.n_layers)
    mine = [layers[number] for number in stages_of(mesh.coordinate("pp"), mesh.axes.pp, config)]
    model.keep_layers([layer for stage in mine for layer in stage])
    return [model.make_stage(stage) for stage in mine]


def apply_fp8(blocks: list[nn.Module], scaling: str) -> None:
    """Compute the blocks' matrix products, forward and backward, in 8 bits; weights keep their dtype."""
    if scaling != "tensorwise":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # type: ignore[import-not-found]

        for block in blocks:
            convert_to_float8_training(block, config=Float8LinearConfig.from_recipe_name(scaling))
        return
    for module in (module for block in blocks for module in block.modules() if isinstance(module, nn.Linear)):
        rows, columns = local(module.weight).shape
        if rows % MULTIPLE or columns % MULTIPLE:
            shape = f"{rows} x {columns}, this rank's part of a matrix"
            raise ParallelError(f"precision.fp8 ({scaling}) needs sizes in multiples of {MULTIPLE}, not {shape}")
        module.__class__ = Fp8Linear


def check_fp8_device(scaling: str, device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise no_fp8(scaling, torch.cuda.get_device_name(device) if device.type == "cuda" else str(device))


def overlap_tp(mesh: DeviceMesh) -> None:
    """Let the compiler overlap matrix products with the collectives of tp; torch has only private switches for it."""
    import torch._inductor.config as inductor_config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor: Any = inductor_config
    inductor._micro_pipeline_tp = True
    enable_symm_mem_for_group(mesh.get_group().group_name)


def compile_blocks(blocks: list[nn.Module], backend: str = "inductor") -> None:
    """Compile each block's parts before and after attention: two graphs, shared by all blocks."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "torchinductor"))  # kept over a reboot
    dynamo: Any = torch._dynamo.config
    # Each shape of micro-batch, in training and validation, is a graph; none may fall back to eager code.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    for block in blocks:
        for part in ("project", "finish"):
            setattr(block, part, torch.compile(getattr(block, part), fullgraph=True, dynamic=False, backend=backend))


def apply_zero(model: Transformer, mesh: Mesh, config: ParallelConfig) -> None:
    """Shard parameters over dp_shard, and sum gradients over it and dp_replicate; each block is gathered by itself.

    Both axes are used at any size, so that gradients are accumulated in `reduce_dtype`.
    """
    assert mesh.param_mesh is not None
    # A sharded embedding returns a view; nothing changes it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    reduce_dtype = torch.float32 if config.reduce_dtype is ReduceDtype.fp32 else torch.bfloat16
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    wrap = partial(fully_shard, mesh=mesh.param_mesh["dp_replicate", "dp_shard"], mp_policy=policy)
    tied = model.norm is not None and model.head is None  # the embedding is gathered with the root, for the head
    parts = [*([] if model.embed is None or tied else [model.embed]), *model.blocks.values()]
    for module in parts:
        wrap(module, reshard_after_forward=config.zero_stage == 3)
    wrap(model, reshard_after_forward=False)  # the head, which the backward pass needs at once
    if mesh.axes.pp > 1 and config.zero_stage == 3:
        # FSDP forgets the order of modules after each backward pass, though other micro-batches are under way.
        for module, following in pairwise([model, *reversed(parts), parts[0]]):
            module.set_modules_to_backward_prefetch([following])  # type: ignore[operator]
    for module in sharded_modules(model):
        # Losses are weighted by 1 / the step's targets, so gradients are summed and not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def set_gradient_sync(model: nn.Module, zero_stage: int, *, last: bool) -> None:
    """Set what the backward pass of a micro-batch does with gradients and parameters under a ZeRO stage."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or zero_stage >= 2)
        model.set_requires_all_reduce(last)
        model.set_reshard_after_backward(last or zero_stage == 3)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@torch.no_grad()
def write_shard(param: Tensor, whole: Tensor) -> None:
    """Set this rank's shard of a parameter from the whole tensor, without communication."""
    if isinstance(param, DTensor):
        whole = whole[shard_slices(param, param.device_mesh.get_coordinate())]
    local(param).copy_(whole)
