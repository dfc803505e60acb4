"""Our names and shapes, and Hugging Face's: writing Llama folders, reading Llama's and InternLM's."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig, ModelError, read_json

LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "mlp.w_gate": "mlp.gate_proj",
    "mlp.w_up": "mlp.up_proj",
    "mlp.w_down": "mlp.down_proj",
}
OUR_NAMES = {theirs: ours for ours, theirs in LLAMA_NAMES.items()}
INTERNLM2_NAMES = {
    "model.tok_embeddings": "embed",
    "model.norm": "norm",
    "output": "head",
    "attention_norm": "attention_norm",
    "ffn_norm": "mlp_norm",
    "attention.wo": "attention.wo",
    "feed_forward.w1": "mlp.w_gate",
    "feed_forward.w3": "mlp.w_up",
    "feed_forward.w2": "mlp.w_down",
}
ARCHITECTURES = ("LlamaForCausalLM", "InternLMForCausalLM", "InternLM2ForCausalLM")


def to_llama_name(name: str) -> str:
    """Give the Llama name of one of our parameters."""
    stem, kind = name.rsplit(".", 1)
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
    if block:
        return f"model.layers.{block[1]}.{LLAMA_NAMES[block[2]]}.{kind}"
    return f"{LLAMA_NAMES[stem]}.{kind}"


def llama_config(
    config: ModelConfig, *, bos_id: int | None, eos_id: int | None, pad_id: int | None, dtype: str
) -> dict[str, Any]:
    """Give the config.json of a model, as transformers 4 and 5 both read it.

    InternLM-1 is a Llama with `attention_bias`, which puts a bias on q, k, v and o.
    """
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
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
    }


def read_hf(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a Hugging Face Llama, InternLM or InternLM2 folder: its shape, and fp32 weights by our names.

    Raises `ModelError` on anything that would not give the same logits here.
    """
    about = read_json(folder / "config.json")
    config = read_hf_config(about, folder)
    internlm2 = about["architectures"][0] == "InternLM2ForCausalLM"
    weights: dict[str, Tensor] = {}
    for name, tensor in _tensors(folder):
        if name.endswith("rotary_emb.inv_freq"):
            continue
        parts = _from_internlm2(name, tensor, config) if internlm2 else [(_our_name(name, OUR_NAMES, folder), tensor)]
        weights |= {ours: part.float() for ours, part in parts}
    if config.tie_embeddings:
        weights.pop("head.weight", None)
    _check_names(weights, config, folder)
    return config, weights


def pad_vocabulary(weights: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Add to a smaller vocabulary rows that are the mean of its own: no text has their ids."""
    padded = dict(weights)
    for name in ("embed.weight", "head.weight"):
        if name in weights and (missing := vocab_size - len(weights[name])) > 0:
            mean = weights[name].mean(dim=0, keepdim=True)
            padded[name] = torch.cat([weights[name], mean.expand(missing, -1)])
    return padded


def read_hf_config(about: dict[str, Any], folder: Path) -> ModelConfig:
    """Turn a config.json into our shape of a model, if it is one that we have."""
    architecture = (about.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{folder}: architectures ({architecture}) is not one that can be read: {', '.join(ARCHITECTURES)}"
        )
    rope = about.get("rope_parameters") or {}
    scaling = about.get("rope_scaling") or {}
    kind = rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    d_model, n_heads = about["hidden_size"], about["num_attention_heads"]
    cannot = {
        "rope_scaling": (kind, "default"),
        "mlp_bias": (about.get("mlp_bias") or False, False),
        "hidden_act": (about.get("hidden_act", "silu"), "silu"),
        "head_dim": (about.get("head_dim") or d_model // n_heads, d_model // n_heads),
        "sliding_window": (about.get("sliding_window"), None),
    }
    for key, (value, needed) in cannot.items():
        if value != needed:
            raise ModelError(f"{folder}: {key} ({value}) is not what this model computes, which is {needed}")
    bias = about.get("attention_bias", about.get("bias", architecture == "InternLMForCausalLM"))
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


def read_stop_ids(folder: Path) -> set[int]:
    """Give the tokens that end a text by a folder's generation_config.json, which it need not have."""
    path = folder / "generation_config.json"
    named = read_json(path).get("eos_token_id") if path.exists() else None
    if named is None:
        return set()
    return set(named) if isinstance(named, list) else {named}


def _our_name(name: str, names: dict[str, str], folder: Path | str) -> str:
    stem, kind = name.rsplit(".", 1)
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    known = names.get(block[2] if block else stem)
    if known is None:
        raise ModelError(f"{folder}: there is no place for its tensor {name}")
    return f"blocks.{block[1]}.{known}.{kind}" if block else f"{known}.{kind}"


def _from_internlm2(name: str, tensor: Tensor, config: ModelConfig) -> list[tuple[str, Tensor]]:
    """Take InternLM2's fused wqkv apart: for each key head its query heads, then the key, then the value."""
    fused = re.fullmatch(r"model\.layers\.(\d+)\.attention\.wqkv\.(weight|bias)", name)
    if not fused:
        return [(_our_name(name, INTERNLM2_NAMES, config.name), tensor)]
    groups = tensor.unflatten(0, (config.n_kv_heads, -1, config.head_dim))
    query, key, value = groups[:, :-2], groups[:, -2], groups[:, -1]
    stem, kind = f"blocks.{fused[1]}.attention", fused[2]
    return [
        (f"{stem}.wq.{kind}", query.flatten(0, 2)),
        (f"{stem}.wk.{kind}", key.flatten(0, 1)),
        (f"{stem}.wv.{kind}", value.flatten(0, 1)),
    ]


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    safe = sorted(folder.glob("*.safetensors"))
    for path in safe:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
    if safe:
        return
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if not pickled:
        raise ModelError(f"{folder} holds no weights: neither *.safetensors nor pytorch_model*.bin is there")
    for path in pickled:
        yield from torch.load(path, map_location="cpu", weights_only=True).items()


def _check_names(weights: dict[str, Tensor], config: ModelConfig, folder: Path) -> None:
    from model.transformer import Transformer

    with torch.device("meta"):
        wanted = {name: param.shape for name, param in Transformer(config).named_parameters()}
    missing, unused = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or unused:
        raise ModelError(
            f"{folder}: tensors missing: {missing[:3] or 'none'}, tensors without a place: {unused[:3] or 'none'}"
        )
    for name, shape in wanted.items():
        if weights[name].shape != shape:
            raise ModelError(
                f"{folder}: {name} is {tuple(weights[name].shape)} and its config.json makes it {tuple(shape)}"
            )
