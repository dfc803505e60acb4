"""Hugging Face's Llama: the family that a model is exported as, and the base of its relatives."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from model.config import ModelConfig, ModelError
from model.transformer import Transformer


class Llama:
    """LlamaForCausalLM; InternLM-1 is one with biases on q, k, v and o. A relative overrides what differs."""

    architectures: tuple[str, ...] = ("LlamaForCausalLM", "InternLMForCausalLM")

    def can_express(self, config: ModelConfig) -> bool:
        """Return whether a model can be exported as this family."""
        return (config.mlp, config.attention_layer) == ("swiglu", "gqa")

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
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "intermediate_size": config.d_ff,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "num_key_value_heads": config.n_kv_heads,
            "head_dim": config.head_dim,
            "max_position_embeddings": config.max_seq_len,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,  # transformers 4
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # transformers 5
            "attention_bias": config.attention_bias,
            "mlp_bias": False,
            "hidden_act": "silu",
            "tie_word_embeddings": config.tie_embeddings,
            "torch_dtype": dtype,  # transformers 4
            "dtype": dtype,
            "use_cache": True,
            **token_ids,
        }

    def read_config(self, about: dict[str, Any], folder: Path) -> ModelConfig:
        """Return our configuration for a config.json; raises `ModelError` if our model computes something else."""
        rope, scaling = about.get("rope_parameters") or {}, about.get("rope_scaling") or {}
        d_model, n_heads = about["hidden_size"], about["num_attention_heads"]
        needed = {
            "rope_scaling": (rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type"), "default"),
            "mlp_bias": (about.get("mlp_bias"), False),
            "hidden_act": (about.get("hidden_act"), "silu"),
            "head_dim": (about.get("head_dim"), d_model // n_heads),
            "sliding_window": (about.get("sliding_window"), None),
        }
        for key, (value, ours) in needed.items():
            if value not in (ours, None):
                raise ModelError(f"{folder}: {key} ({value}) is not supported; this model has {ours}")
        bias = about.get("attention_bias", about.get("bias", about["architectures"] == ["InternLMForCausalLM"]))
        return ModelConfig(
            name=folder.name,
            vocab_size=about["vocab_size"],
            d_model=d_model,
            n_layers=about["num_hidden_layers"],
            n_heads=n_heads,
            n_kv_heads=about.get("num_key_value_heads") or n_heads,
            d_ff=about["intermediate_size"],
            attention_bias=bool(bias),
            max_seq_len=about.get("max_position_embeddings", 2048),
            rope_theta=float(rope.get("rope_theta") or about.get("rope_theta") or 10000.0),
            norm_eps=about.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(about.get("tie_word_embeddings", False)),
        )

    def split(self, name: str, tensor: Tensor, config: ModelConfig) -> Iterable[tuple[str, Tensor]]:
        """Return the tensors that a stored one is made of, by this family's names."""
        return [(name, tensor)]
