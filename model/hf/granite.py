"""Hugging Face's Granite: Llama with multipliers, for mup models whose multipliers cannot be folded into weights."""

from pathlib import Path
from typing import Any

from model.config import ModelConfig, ModelError, Parametrization
from model.hf.llama import Llama


class Granite(Llama):
    architectures = ("GraniteForCausalLM",)

    def can_express(self, config: ModelConfig) -> bool:
        return (config.mlp, config.attention_layer) == ("swiglu", "gqa")

    def factor(self, name: str, config: ModelConfig) -> float:
        return 1.0

    def write_config(self, config: ModelConfig, *, dtype: str, **token_ids: int | None) -> dict[str, Any]:
        return super().write_config(config, dtype=dtype, **token_ids) | {
            "architectures": ["GraniteForCausalLM"],
            "model_type": "granite",
            "embedding_multiplier": 1.0,
            "attention_multiplier": config.head_dim**-0.5,
            "residual_multiplier": 1 / config.depth_ratio,
            "logits_scaling": config.width_ratio,
        }

    def read_config(self, about: dict[str, Any], folder: Path) -> ModelConfig:
        plain = super().read_config(about, folder)
        width, depth = plain.d_model / about["logits_scaling"], plain.n_layers * about["residual_multiplier"]
        ours = {"embedding_multiplier": 1.0, "attention_multiplier": plain.head_dim**-0.5}
        other = [key for key, value in ours.items() if abs(about[key] - value) > 1e-6 * value]
        if other or min(width, depth) < 0.5 or abs(width - round(width)) + abs(depth - round(depth)) > 1e-4:
            raise ModelError(f"{folder}: its multipliers are not those of a mup or completep model")
        plain.base_width, plain.base_depth = round(width), round(depth)
        plain.parametrization = Parametrization.completep
        return plain
