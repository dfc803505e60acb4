"""Hugging Face model families, read and written. A new one is a class like `Llama` and an entry of FAMILIES."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig, ModelError
from model.hf.granite import Granite
from model.hf.internlm2 import InternLM2
from model.hf.llama import Llama
from model.transformer import Transformer

HEADS = ("lm_head.weight", "output.weight")  # redundant in a file with tied embeddings
FAMILIES: tuple[Llama, ...] = (Llama(), Granite(), InternLM2())  # export takes the first that fits


def export_family(config: ModelConfig) -> Llama:
    """Return the first family that can express the model."""
    for family in FAMILIES:
        if family.can_express(config):
            return family
    raise ModelError(f"model.mlp ({config.mlp}) with {config.attention_layer} attention has no Hugging Face family")


def read_config(folder: Path) -> tuple[ModelConfig, Llama]:
    """Return the configuration and the family of a Hugging Face folder."""
    about = read_json(folder / "config.json")
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
    ids = read_json(path).get("eos_token_id") if path.exists() else None
    return set() if ids is None else set(ids) if isinstance(ids, list) else {ids}


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: {path.parent} is not a Hugging Face model") from None


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors.torch import load_file

    paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not paths:
        raise ModelError(f"{folder} has no weights: neither *.safetensors nor pytorch_model*.bin")
    for path in paths:
        pickled = path.suffix == ".bin"
        yield from (torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(path)).items()
