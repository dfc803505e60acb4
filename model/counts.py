"""Parameters and FLOPs per token of a model."""

from model.config import ModelConfig


def count_params(config: ModelConfig) -> int:
    """Return the parameters of the whole model, embedding and head included."""
    return config.n_params


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    return config.flops_per_token(seq_len)


def internlm_flops_per_token(config: ModelConfig, seq_len: int, *, recompute: bool = False) -> float:
    return config.internlm_flops_per_token(seq_len, recompute=recompute)
