"""A small model, whose fields a test changes."""

from typing import Any

from model.config import Init, ModelConfig


def small_model(**changes: Any) -> ModelConfig:
    shape = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}
    return ModelConfig(**{"name": "small", **shape, "max_seq_len": 64, "init": Init.llama, **changes})
