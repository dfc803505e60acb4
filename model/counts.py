"""Parameters and FLOPs per token of a model, counted over its modules."""

from torch import nn

from model.config import ModelConfig
from model.transformer import Transformer


def count_params(config: ModelConfig) -> int:
    """Return the number of parameters, embedding and head included."""
    return sum(param.numel() for param in Transformer.on_meta(config).parameters())


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Return the FLOPs per token, forward and backward, of causal attention and without recomputation.

    The forward pass has two per weight of a matrix product (not the embedding), or what a module's
    `forward_flops(seq_len)` returns; the backward pass has twice as many.
    """
    blocks = sum(_forward_flops(block, seq_len) for block in Transformer.on_meta(config).blocks.values())
    return 3 * (blocks + 2 * config.vocab_size * config.d_model)


def _forward_flops(module: nn.Module, seq_len: int) -> int:
    if (own := getattr(module, "forward_flops", None)) is not None:
        return own(seq_len)
    weights = sum(param.numel() for param in module.parameters(recurse=False) if param.ndim > 1)
    return 2 * weights + sum(_forward_flops(child, seq_len) for child in module.children())


def internlm_flops_per_token(config: ModelConfig, seq_len: int, *, recompute: bool = False) -> float:
    """Return the FLOPs per token by the formula of InternLM's published TFLOP/s (`get_megatron_flops`, v0.2.1).

    It counts full attention without grouped queries, and with `recompute` a second forward pass.
    """
    factor = 4 if recompute else 3
    # InternLM's mlp_ratio is d_ff / d_model before rounding d_ff up to a multiple of 256.
    rounded = -(-int(config.d_model * 8 / 3) // 256) * 256
    mlp_ratio = 8 / 3 if config.d_ff == rounded else config.d_ff / config.d_model
    layer = factor * ((8 + 6 * mlp_ratio) * config.d_model**2 + 4 * seq_len * config.d_model)
    return layer * config.n_layers + 6 * config.d_model * config.vocab_size
