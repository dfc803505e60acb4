"""Parameters and FLOPs per token of a model, counted on the modules it is made of."""

from torch import nn

from model.config import ModelConfig
from model.transformer import Transformer


def count_params(config: ModelConfig) -> int:
    """Return the parameters of the whole model, embedding and head included."""
    return sum(param.numel() for param in Transformer.on_meta(config).parameters())


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Return the FLOPs per token, forward and backward, causal attention counted once, nothing recomputed.

    Forward it is two per weight that is multiplied (the embedding is looked up), unless a module's own
    `forward_flops(seq_len)` has another count; backward it is twice as many.
    """
    blocks = sum(_forward_flops(block, seq_len) for block in Transformer.on_meta(config).blocks.values())
    return 3 * (blocks + 2 * config.vocab_size * config.d_model)


def _forward_flops(module: nn.Module, seq_len: int) -> int:
    if (own := getattr(module, "forward_flops", None)) is not None:
        return own(seq_len)
    weights = sum(param.numel() for param in module.parameters(recurse=False) if param.ndim > 1)
    return 2 * weights + sum(_forward_flops(child, seq_len) for child in module.children())


def internlm_flops_per_token(config: ModelConfig, seq_len: int, *, recompute: bool = False) -> float:
    """Return the FLOPs per token by InternLM's published formula, which its TFLOP/s figures use.

    Full attention, no grouped queries, and with `recompute` a second forward pass (`get_megatron_flops` in
    InternLM v0.2.1).
    """
    factor = 4 if recompute else 3
    # Its mlp_ratio is the one before the width was rounded up to a multiple of 256.
    rounded = -(-int(config.d_model * 8 / 3) // 256) * 256
    mlp_ratio = 8 / 3 if config.d_ff == rounded else config.d_ff / config.d_model
    layer = factor * ((8 + 6 * mlp_ratio) * config.d_model**2 + 4 * seq_len * config.d_model)
    return layer * config.n_layers + 6 * config.d_model * config.vocab_size
