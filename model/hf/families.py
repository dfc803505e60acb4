"""Hugging Face model families, read and written. A new one is a class like `Llama` and an entry of FAMILIES."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig, ModelError, Parametrization
from model.transformer import Transformer

HEADS = ("lm_head.weight", "output.weight")  # redundant in a file with tied embeddings
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
INTERNLM2_NAMES = {  # Llama -> InternLM2
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


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


class Granite(Llama):
    """Llama with multipliers, for mup models whose multipliers cannot be folded into weights."""

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


class InternLM2(Llama):
    """InternLM2, read only: Llama with other tensor names and one matrix for q, k and v."""

    architectures = ("InternLM2ForCausalLM",)

    def can_express(self, config: ModelConfig) -> bool:
        return False

    def names(self, config: ModelConfig) -> dict[str, str]:
        found = super().names(config)
        for theirs, other in INTERNLM2_NAMES.items():
            found = {ours: name.replace(theirs, other) for ours, name in found.items()}
        return found

    def split(self, name: str, tensor: Tensor, config: ModelConfig) -> Iterable[tuple[str, Tensor]]:
        """Split wqkv, whose rows are, per key head, its query heads, the key and the value."""
        if ".wqkv." not in name:
            return [(name, tensor)]
        groups = tensor.unflatten(0, (config.n_kv_heads, -1, config.head_dim))
        parts = {"q": groups[:, :-2].flatten(0, 2), "k": groups[:, -2].flatten(0, 1), "v": groups[:, -1].flatten(0, 1)}
        return [(name.replace("attention.wqkv", f"self_attn.{x}_proj"), part) for x, part in parts.items()]


FAMILIES: tuple[Llama, ...] = (Llama(), Granite(), InternLM2())  # export takes the first that fits


def export_family(config: ModelConfig) -> Llama:
    """Return the first family that can express the model."""
    for family in FAMILIES:
        if family.can_express(config):
            return family
    raise ModelError(f"model.mlp ({config.mlp}) with {config.attention_layer} attention has no Hugging Face family")


def read_config(folder: Path) -> tuple[ModelConfig, Llama]:
    """Return the configuration and the family of a Hugging Face folder."""
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = (about.get("architectures") or ["none"])[0]
    known = {name: family for family in FAMILIES for name in family.architectures}
    if architecture not in known:
        raise ModelError(f"{folder}: architectures ({architecture}) is not one of {', '.join(known)}")
    return known[architecture].read_config(about, folder), known[architecture]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a Hugging Face folder in fp32 under our parameter names."""
    config, family = read_config(folder)
    our_names = {hf_name: name for name, hf_name in family.names(config).items()}
    weights: dict[str, Tensor] = {}
    for stored, whole in _tensors(folder):
        for name, tensor in family.split(stored, whole, config):
            if name in our_names:
                weights[our_names[name]] = tensor.float()
            elif not name.endswith("rotary_emb.inv_freq") and not (config.tie_embeddings and name in HEADS):
                raise ModelError(f"{folder}: the model has no place for tensor {name}")
    for name, param in Transformer.on_meta(config).named_parameters():
        found = weights[name].shape if name in weights else None
        if found != param.shape:
            raise ModelError(f"{folder}: {name} is {found or 'missing'}; config.json says {param.shape}")
    return weights


def pad_vocabulary(weights: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Pad embedding and head to `vocab_size` rows with the mean of their rows; no text has these ids."""
    padded = dict(weights)
    for name in ("embed.weight", "head.weight"):
        if name in weights and (missing := vocab_size - len(weights[name])) > 0:
            mean = weights[name].mean(dim=0, keepdim=True)
            padded[name] = torch.cat([weights[name], mean.expand(missing, -1)])
    return padded


def read_stop_ids(folder: Path) -> set[int]:
    """Return the eos_token_id of a folder's generation_config.json as a set, empty without one."""
    path = folder / "generation_config.json"
    ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
    return set() if ids is None else set(ids) if isinstance(ids, list) else {ids}


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors.torch import load_file

    paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not paths:
        raise ModelError(f"{folder} has no weights: neither *.safetensors nor pytorch_model*.bin")
    for path in paths:
        pickled = path.suffix == ".bin"
        yield from (torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(path)).items()
