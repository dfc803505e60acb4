"""Read training checkpoints of InternLM v0.2.1, and of InternEvo for InternLM and InternLM2.

They are model_config.pt and one model_tp{i}_pp{j}.pt per tensor-parallel and pipeline rank.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from model.config import ModelConfig, ModelError
from model.transformer import Transformer

PART = re.compile(r"model_tp(\d+)_pp(\d+)\.pt")
NAME = re.compile(r"(?:(\d+)\.)?(?:model\.)?(?:(?:blocks|layers)\.(\d+)\.)?(.+)\.(weight|bias)")  # chunk, layer, name
NAMES = {
    "embedding": "embed", "embedding.word_embeddings": "embed", "tok_embeddings": "embed",
    "tok_embeddings.word_embeddings": "embed", "norm": "norm", "head": "head", "output": "head",
    "norm1": "attention_norm", "attention_norm": "attention_norm", "norm2": "mlp_norm", "ffn_norm": "mlp_norm",
    "mixer.out_proj": "attention.wo", "attention.wo": "attention.wo", "mlp.w1": "mlp.w_gate",
    "feed_forward.w1": "mlp.w_gate", "feed_forward.w2": "mlp.w_down", "feed_forward.w3": "mlp.w_up",
}  # fmt: skip
SUPPORTED = {
    "use_swiglu": True, "norm_type": "rmsnorm", "norm_head": False, "num_experts": 1, "apply_post_layer_norm": False,
}  # fmt: skip


def read_training_checkpoint(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the configuration and the merged fp32 weights under our parameter names."""
    about = _load(folder / "model_config.pt")
    for key, ours in SUPPORTED.items():
        if about.get(key, ours) != ours:
            raise ModelError(f"{folder}: {key} ({about[key]}) is not supported; this model has {ours}")
    names = ((PART.fullmatch(path.name), path) for path in folder.iterdir())
    paths = {(int(name[2]), int(name[1])): path for name, path in names if name}  # by (pp, tp)
    stage, rank = max(paths, default=(0, 0))
    if len(paths) != (wanted := (stage + 1) * (rank + 1)):
        raise ModelError(f"{folder} has {len(paths)} of {wanted} files model_tp*_pp*.pt; all are needed")
    # By layer and name, one part per tp rank. Layers are numbered from 0 in each stage; their order is chunk, stage.
    parts: dict[tuple[int, int, int], dict[str, list[Tensor]]] = {}
    for (stage, _), path in sorted(paths.items()):
        for chunk, layer, name, part in _named_parts(_load(path), about, path):
            parts.setdefault((chunk, stage, layer), {}).setdefault(name, []).append(part)
    layers = enumerate(parts[place] for place in sorted(parts) if place[2] >= 0)
    named = {f"blocks.{n}.{name}": split for n, layer in layers for name, split in layer.items()}
    named |= {name: split for place, found in parts.items() if place[2] < 0 for name, split in found.items()}
    config = ModelConfig(
        name=folder.name,
        vocab_size=about["vocab_size"],
        d_model=about["hidden_size"],
        n_layers=about["num_layers"],
        n_heads=about["num_attention_heads"],
        n_kv_heads=about.get("num_kv_attention_heads") or about["num_attention_heads"],
        d_ff=sum(map(len, named.get("blocks.0.mlp.w_gate.weight", ()))),
        attention_bias="blocks.0.attention.wq.bias" in named,
        max_seq_len=about.get("max_position_embeddings", 2048),
        rope_theta=float(about.get("rope_base", 10000)),
        norm_eps=about.get("layer_norm_epsilon", 1e-5),
    )
    shapes = {name: param.shape for name, param in Transformer.on_meta(config).named_parameters()}
    if different := sorted(shapes.keys() ^ named.keys()):
        raise ModelError(f"{folder}: {different[0]} is {'missing' if different[0] in shapes else 'unknown'}")
    return config, {name: _merged(named.pop(name), shape, f"{folder}: {name}") for name, shape in shapes.items()}


def _load(path: Path) -> dict[str, Any]:
    try:
        # InternLM pickles its configuration as a class `Config`, a dict with attributes.
        configs = [name for name in get_unsafe_globals_in_checkpoint(path) if name.endswith(".Config")]
        with safe_globals([(dict, name) for name in configs]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError:
        raise ModelError(f"{path} has Python objects; only tensors and plain values can be read") from None


def _named_parts(state: dict[str, Tensor], about: dict[str, Any], path: Path) -> Iterator[tuple[int, int, str, Tensor]]:
    """Yield (chunk, layer, name, tensor) of one file, with layer -1 outside of layers, and q, k and v split."""
    shapes = {key.split("mlp.")[1]: tensor.shape for key, tensor in state.items() if ".mlp.w" in key}
    gate, w2, w3 = (shapes.get(f"w{n}.weight") for n in (1, 2, 3))
    # The up projection is w2 in v0.2.1, whose names start with `model.`, and w3 in InternEvo.
    up_is_w2 = w2 == gate if w2 != w3 else "model." in next(iter(state))
    up, down = ("mlp.w2", "mlp.w3") if up_is_w2 else ("mlp.w3", "mlp.w2")
    names = {**NAMES, up: "mlp.w_up", down: "mlp.w_down"}
    for key, tensor in state.items():
        if key.endswith("inv_freq"):
            continue
        if (found := NAME.fullmatch(key)) is None or (found[3] not in names and "wqkv" not in found[3].lower()):
            raise ModelError(f"{path}: the model has no place for tensor {key}")
        place = int(found[1] or 0), int(found[2] or -1)
        if found[3] in names:
            yield *place, f"{names[found[3]]}.{found[4]}", tensor
        else:
            for letter, part in zip("qkv", _split_qkv(tensor, about, found[3]), strict=True):
                yield *place, f"attention.w{letter}.{found[4]}", part


def _split_qkv(tensor: Tensor, about: dict[str, Any], name: str) -> list[Tensor]:
    """Return a rank's q, k and v. InternLM's rows are q, then k, then v; InternLM2's are grouped by key head."""
    n_heads, head_dim = about["num_attention_heads"], about["hidden_size"] // about["num_attention_heads"]
    if name == "mixer.Wqkv":
        return list(tensor.chunk(3))
    groups = tensor.unflatten(0, (-1, n_heads // about["num_kv_attention_heads"] + 2, head_dim))
    q, k, v = groups[:, :-2].flatten(0, 1), groups[:, -2], groups[:, -1]
    if about.get("qk_interleaved", not about.get("adapt_hf", False)):  # to rotary pairs in halves, as ours are
        q, k = (x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2) for x in (q, k))
    return [x.flatten(0, 1) for x in (q, k, v)]


def _merged(parts: list[Tensor], shape: torch.Size, what: str) -> Tensor:
    """Concatenate the parts of the tensor-parallel ranks along the sharded axis; norms and biases are replicated."""
    axes = [axis for axis, size in enumerate(shape) if parts[0].shape[axis] != size]
    whole = (torch.cat(parts, axes[0]) if axes else parts[0]).float()
    if whole.shape != shape:
        raise ModelError(f"{what} is {tuple(whole.shape)}; model_config.pt says {tuple(shape)}")
    return whole
