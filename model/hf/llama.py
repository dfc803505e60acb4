"""Hugging Face's Llama, the usual export, and the base class of the other families."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from model.config import ModelConfig, ModelError
from model.transformer import Transformer

FIELDS = {  # config.json -> ModelConfig
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
    """LlamaForCausalLM, and InternLM-1, which adds biases to q, k, v and o. Subclasses override what differs."""

    architectures: tuple[str, ...] = ("LlamaForCausalLM", "InternLMForCausalLM")

    def can_express(self, config: ModelConfig) -> bool:
        """Return whether a model can be exported as this family."""
        folds = config.width_ratio == 1 or not config.tie_embeddings
        return (config.mlp, config.attention_layer) == ("swiglu", "gqa") and folds

    def factor(self, name: str, config: ModelConfig) -> float:
        """Return the factor to fold into a weight on export, because the family's forward pass does not apply it."""
        if name == "head.weight":
            return 1 / config.width_ratio
        return 1 / config.depth_ratio if name.rpartition(".")[0].endswith((".wo", ".w_down")) else 1.0

    def names(self, config: ModelConfig) -> dict[str, str]:
        """Map our parameter names to the family's."""
        model = Transformer.on_meta(config)
        known = dict(model.known_weights())
        found = {}
        for name, _ in model.named_parameters():
            path, _, kind = name.rpartition(".")
            layer = f"model.layers.{path.split('.')[1]}." if path.startswith("blocks.") else ""
            found[name] = f"{layer}{known[path].hf}.{kind}"
        return found

    def write_config(self, config: ModelConfig, *, dtype: str, **token_ids: int | None) -> dict[str, Any]:
        """Return the contents of config.json, readable by transformers 4 and 5."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **{hf_key: getattr(config, key) for hf_key, key in FIELDS.items()},
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
        """Return our configuration for a config.json; raise `ModelError` if our model cannot compute the same."""
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
        """Split a stored tensor into named parameters, still under the family's names."""
        return [(name, tensor)]
