"""Hugging Face's Llama: the family that a model is exported as, and the base of its relatives."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from model.config import ModelConfig, ModelError
from model.transformer import Transformer

FIELDS = {  # of config.json and of ModelConfig
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "attention_bias": "attention_bias",
    "tie_word_embeddings": "tie_embeddings",
}
DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}


class Llama:
    """LlamaForCausalLM; InternLM-1 is one with biases on q, k, v and o. A relative overrides what differs."""

    architectures: tuple[str, ...] = ("LlamaForCausalLM", "InternLMForCausalLM")

    def can_express(self, config: ModelConfig) -> bool:
        """Return whether a model can be exported as this family."""
        folds = config.width_ratio == 1 or not config.tie_embeddings
        return (config.mlp, config.attention_layer) == ("swiglu", "gqa") and folds

    def factor(self, name: str, config: ModelConfig) -> float:
        """Return what a weight of ours is multiplied by, in place of a factor that the family's forward pass lacks."""
        if name == "head.weight":
            return 1 / config.width_ratio
        return 1 / config.depth_ratio if name.rpartition(".")[0].endswith((".wo", ".w_down")) else 1.0

    def names(self, config: ModelConfig) -> dict[str, str]:
        """Return this family's name of each of our parameters."""
        model = Transformer.on_meta(config)
        known = dict(model.known_weights())
        found = {}
        for name, _ in model.named_parameters():
            path, _, kind = name.rpartition(".")
            layer = f"model.layers.{path.split('.')[1]}." if path.startswith("blocks.") else ""
            found[name] = f"{layer}{known[path].hf}.{kind}"
        return found

    def write_config(self, config: ModelConfig, *, dtype: str, **token_ids: int | None) -> dict[str, Any]:
        """Return the config.json of a model, as transformers 4 and 5 both read it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **{theirs: getattr(config, ours) for theirs, ours in FIELDS.items()},
            "head_dim": config.head_dim,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # transformers 5
            "mlp_bias": False,
            "hidden_act": "silu",
            "torch_dtype": dtype,  # transformers 4
            "dtype": dtype,
            "use_cache": True,
            **token_ids,
        }

    def read_config(self, about: dict[str, Any], folder: Path) -> ModelConfig:
        """Return our configuration for a config.json; raises `ModelError` if our model computes something else."""
        rope, scaling = about.get("rope_parameters") or {}, about.get("rope_scaling") or {}
        head_dim = about["hidden_size"] // about["num_attention_heads"]
        kind = rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type")
        supported = {"mlp_bias": False, "hidden_act": "silu", "head_dim": head_dim, "sliding_window": None}
        for key, ours in {**supported, "rope_scaling": "default"}.items():
            value = kind if key == "rope_scaling" else about.get(key)
            if value not in (ours, None):
                raise ModelError(f"{folder}: {key} ({value}) is not supported; this model has {ours}")
        bias = about.get("bias", about["architectures"] == ["InternLMForCausalLM"])
        defaults = {"num_key_value_heads": about["num_attention_heads"], "attention_bias": bias, **DEFAULTS, **rope}
        given = {key: value for key, value in about.items() if value is not None}
        fields = {ours: {**defaults, **given}[theirs] for theirs, ours in FIELDS.items()}
        return ModelConfig(name=folder.name, **{**fields, "rope_theta": float(fields["rope_theta"])})

    def split(self, name: str, tensor: Tensor, config: ModelConfig) -> Iterable[tuple[str, Tensor]]:
        """Return the tensors that a stored one is made of, by this family's names."""
        return [(name, tensor)]
