"""Apply a parallel layout to a model."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from model.transformer import Transformer
from parallel.async_tp import fused_linears, overlap_tp
from parallel.axes import stage_layers, stages_of
from parallel.config import ActivationCheckpointing, ParallelConfig, ParallelError
from parallel.fp8 import MULTIPLE, Fp8Linear, Fp8RowwiseLinear
from parallel.mesh import Mesh
from parallel.shards import ALIGNMENT, ParamShard, matrices_first
from parallel.tensor_parallel import RowwiseLinear, apply_cp, apply_tp, collectives
from parallel.zero import Zero

BLOCK_PARTS = ("project", "finish")  # of a block, around attention
# Operations that selective activation checkpointing does not repeat
aten: Any = torch.ops.aten
PRODUCTS = [
    *(op.default for op in (aten.mm, aten.addmm, aten.bmm, aten._scaled_mm)),
    *(op.default for op in (collectives.reduce_scatter_tensor, collectives.all_reduce)),
    *(getattr(torch.ops.pretraining, name).default for name in ("gather_matmul", "matmul_scatter")),
]


def recomputed_blocks(n_blocks: int, config: ParallelConfig) -> int:
    """Return how many of the first blocks recompute all activations in the backward pass."""
    fraction = {"full": 1.0, "fraction": config.activation_checkpointing_fraction}
    return round(n_blocks * fraction.get(config.activation_checkpointing.value, 0.0))


@dataclass(slots=True)
class ParallelModel:
    """This rank's layers of a model on a mesh, their pipeline stages, and the trained shards."""

    module: Transformer
    stages: list[Transformer]
    params: dict[str, ParamShard]
    partial_grads: set[str]  # parameters whose gradients are to be summed over tp
    zero: Zero | None
    mesh: Mesh
    layout: ParallelConfig

    def init_weights(self, seed: int) -> None:
        self.module.init_weights(seed, self.params, ParamShard.write)


def parallelize(
    model: Transformer,
    mesh: Mesh,
    config: ParallelConfig,
    dtype: torch.dtype,
    *,
    fp8: str = "none",
    grad_dtype: torch.dtype | None = None,
) -> ParallelModel:
    """Lay out a model on the meta device, and allocate its parameters without initializing them.

    `fp8` is `none` or the name of a scaling; `grad_dtype` is that of accumulated gradients, if not `dtype`.
    """
    stages = split_stages(model, mesh, config)
    blocks = list(model.blocks.values())
    shapes = {name: param.shape for name, param in model.named_parameters()}
    tp_dims, partial_grads = dict[str, int](), set[str]()
    if mesh.param_mesh is not None and mesh.axes.tp > 1:
        tp_mesh, fused = mesh.param_mesh["tp"], fused_linears(model) if config.async_tp else {}
        tp_dims, partial_grads = apply_tp(model, tp_mesh, config.sequence_parallel, local_norms=fused)
        if config.async_tp:
            overlap_tp(model, fused.values(), tp_mesh.get_group(), mesh.device)
    if fp8 != "none":
        check_fp8_device(fp8, mesh.device)
        apply_fp8(blocks, fp8)
    if mesh.batch_mesh is not None and mesh.axes.cp > 1:
        apply_cp(model, mesh.batch_mesh["cp"])
    for block in blocks[: recomputed_blocks(len(blocks), config)]:
        # There is no dropout, so no generator state to restore.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    for block in blocks if config.activation_checkpointing is ActivationCheckpointing.selective else ():
        for part in BLOCK_PARTS:
            setattr(block, part, keep_products(getattr(block, part)))
    if config.compiles(mesh.device.type):
        compile_blocks(blocks)
    sharded = mesh.axes.dp * mesh.axes.cp > 1
    for part in (*blocks, model.embed, model.norm, model.head):
        if part is not None:
            # ZeRO units allocate sharded parameters.
            allocate(part, dtype, torch.device("meta") if sharded else mesh.device)
    zero = Zero(stages, mesh, config, grad_dtype or dtype) if sharded else None
    if zero is None and grad_dtype is not None and grad_dtype != dtype:
        for param in model.parameters():
            param.grad_dtype = grad_dtype  # type: ignore[attr-defined]
    shards = dict(model.named_parameters()) if zero is None else zero.shards
    axes = [*(["dp_replicate", "dp_shard"] if sharded else []), *(["tp"] if mesh.axes.tp > 1 else [])]
    shard_mesh = mesh.param_mesh[tuple(axes)] if mesh.param_mesh is not None and axes else None
    params = {
        name: ParamShard(shards[name], shape, shard_mesh, placements(axes, tp_dims.get(name), mesh.axes.tp))
        for name, shape in shapes.items()
    }
    return ParallelModel(model, stages, params, partial_grads, zero, mesh, config)


def allocate(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Allocate the parameters of a module in one buffer."""
    named = matrices_first(module)
    sizes = [-(-param.numel() // ALIGNMENT) * ALIGNMENT for _, param in named]
    flat = torch.empty(sum(sizes), dtype=dtype, device=device)
    for (name, param), part in zip(named, flat.split(sizes), strict=True):
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(part[: param.numel()].view(param.shape)))


def placements(axes: list[str], tp_dim: int | None, tp: int) -> tuple[Placement, ...]:
    """Return the placements of a parameter on mesh axes; tp splits before dp_shard, which shards rows."""
    rows = _StridedShard(0, split_factor=tp) if tp_dim == 0 else Shard(0)
    by_axis = {"dp_replicate": Replicate(), "dp_shard": rows, "tp": Replicate() if tp_dim is None else Shard(tp_dim)}
    return tuple(by_axis[axis] for axis in axes)


def split_stages(model: Transformer, mesh: Mesh, config: ParallelConfig) -> list[Transformer]:
    """Remove the layers of other pipeline ranks; return the stages, which share parameters with the model."""
    if mesh.axes.pp == 1:
        return [model]
    model.untie_head()
    layers = stage_layers(config, mesh.axes, model.config.n_layers)
    local_stages = [layers[index] for index in stages_of(mesh.coordinate("pp"), mesh.axes.pp, config)]
    model.keep_layers([layer for stage in local_stages for layer in stage])
    return [model.make_stage(stage) for stage in local_stages]


def apply_fp8(blocks: list[nn.Module], scaling: str) -> None:
    """Compute the matrix products of blocks in fp8, forward and backward; weights keep their dtype."""
    if scaling != "tensorwise":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # type: ignore[import-not-found]

        for block in blocks:
            convert_to_float8_training(block, config=Float8LinearConfig.from_recipe_name(scaling))
        return
    linears: list[Any] = [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
    for module in linears:
        rows, columns = module.weight.shape
        if rows % MULTIPLE or columns % MULTIPLE:
            shape = f"{rows} x {columns}, this rank's part of a matrix"
            raise ParallelError(f"precision.fp8 ({scaling}) needs sizes in multiples of {MULTIPLE}, not {shape}")
        rowwise = bool(isinstance(module, RowwiseLinear))
        module.__class__ = Fp8RowwiseLinear if rowwise else Fp8Linear


def check_fp8_device(scaling: str, device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        found = torch.cuda.get_device_name(device) if device.type == "cuda" else device
        needs = f"needs a GPU of compute capability 8.9 or more, not {found}"
        raise ParallelError(f"precision.fp8 ({scaling}) {needs}; set precision.fp8=none")


def keep_products(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that saves its inputs and `PRODUCTS`, and recomputes the rest in the backward pass."""

    @wraps(function)
    def checkpointed(*args: Any) -> Any:
        context_fn = partial(create_selective_checkpoint_contexts, PRODUCTS)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn)

    return checkpointed


def compile_blocks(blocks: list[nn.Module], backend: str = "inductor") -> None:
    """Compile the parts of blocks before and after attention; all blocks share the two graphs."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # Unlike the default in /tmp, it survives a reboot.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "torchinductor"))
    dynamo: Any = torch._dynamo.config
    # One graph per micro-batch shape of training and validation; beyond the limit code would run eagerly.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    for block in blocks:
        for part in BLOCK_PARTS:
            setattr(block, part, torch.compile(getattr(block, part), fullgraph=True, dynamic=False, backend=backend))
