"""What is done to a model before it is trained, by module path, in the one right order."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from parallel.config import ActivationCheckpointing, ParallelConfig
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
    blocks = model.get_submodule("blocks")
    for i in range(recomputed_blocks(len(list(blocks.children())), config)):
        block = blocks.get_submodule(str(i))
        # The model has no randomness, so there is no generator state to replay.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(param.to(dtype)))
    model.to_empty(device=mesh.device)
