"""InternLM's training checkpoints are merged from any number of tensor- and pipeline-parallel ranks."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import export
from conf.schema import ExportConfig
from model.config import ModelError
from model.transformer import Transformer
from tests.models import small_model
from training.config import Dtype
from training.load import open_saved

SHAPE = small_model(n_layers=4, n_kv_heads=4, d_ff=64, max_seq_len=2048, attention_bias=True)
ABOUT = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64, "layer_norm_epsilon": 1e-5}


def save_config(path: Path, about: dict[str, Any]) -> None:
    """Pickle a configuration as InternLM does: as a class that only its own package has."""
    name = "internlm.core.context.parallel_context"
    module = ModuleType(name)
    module.Config = type("Config", (dict,), {"__module__": name})  # type: ignore[attr-defined]
    parts = name.split(".")
    packages = {".".join(parts[:n]): ModuleType(".".join(parts[:n])) for n in range(1, len(parts))} | {name: module}
    sys.modules.update(packages)
    try:
        torch.save(module.Config(about, dtype=torch.bfloat16), path)
    finally:
        for package in packages:
            del sys.modules[package]


def names_of_layer(weights: dict[str, Tensor], stem: str, kind: str, tp: int, rank: int) -> dict[str, Tensor]:
    """Return the part of a layer that a tensor-parallel rank holds, by InternLM's names."""

    def part(name: str, axis: int = 0) -> Tensor:
        return weights[f"{stem}.{name}"].chunk(tp, axis)[rank]

    if kind == "internlm2":
        q, k, v = (part(f"attention.w{x}.weight").unflatten(0, (-1, 8)) for x in "qkv")  # heads of 8
        q, k = (x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2) for x in (q, k))  # rotary pairs are neighbours
        groups = torch.cat([q.unflatten(0, (len(k), -1)), k[:, None], v[:, None]], dim=1)
        return {
            "attention.wqkv.weight": groups.flatten(0, 2),
            "attention.wo.weight": part("attention.wo.weight", 1),
            "attention_norm.weight": weights[f"{stem}.attention_norm.weight"],
            "ffn_norm.weight": weights[f"{stem}.mlp_norm.weight"],
            "feed_forward.w1.weight": part("mlp.w_gate.weight"),
            "feed_forward.w2.weight": part("mlp.w_down.weight", 1),
            "feed_forward.w3.weight": part("mlp.w_up.weight"),
        }
    up, down = ("w2", "w3") if kind == "v0.2.1" else ("w3", "w2")
    found = {
        "mixer.Wqkv.weight": torch.cat([part(f"attention.w{x}.weight") for x in "qkv"]),
        "mixer.Wqkv.bias": torch.cat([part(f"attention.w{x}.bias") for x in "qkv"]),
        "mixer.rotary_emb.inv_freq": torch.ones(4),
        "mixer.out_proj.weight": part("attention.wo.weight", 1),
        "norm1.weight": weights[f"{stem}.attention_norm.weight"],
        "norm2.weight": weights[f"{stem}.mlp_norm.weight"],
        "mlp.w1.weight": part("mlp.w_gate.weight"),
        f"mlp.{up}.weight": part("mlp.w_up.weight"),
        f"mlp.{down}.weight": part("mlp.w_down.weight", 1),
    }
    return found if rank else found | {"mixer.out_proj.bias": weights[f"{stem}.attention.wo.bias"]}


def write(folder: Path, model: Transformer, kind: str, tp: int, pp: int, chunks: int = 1) -> None:
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    second = kind == "internlm2"
    prefix, block = ("model." if kind == "v0.2.1" else ""), "layers" if second else "blocks"
    about = {**ABOUT, **({"num_kv_attention_heads": 2, "adapt_hf": False} if second else {})}
    save_config(folder / "model_config.pt", about)
    size = 4 // pp // chunks
    for rank in range(tp):
        for stage in range(pp):
            state = {}
            for chunk in range(chunks):
                before = f"{chunk}.{prefix}" if chunks > 1 else prefix
                first = (chunk * pp + stage) * size
                for local in range(size):
                    found = names_of_layer(weights, f"blocks.{first + local}", kind, tp, rank)
                    state |= {f"{before}{block}.{local}.{name}": tensor for name, tensor in found.items()}
                if first == 0:
                    name, axis = ("tok_embeddings" if second else "embedding"), 1 if kind == "v0.2.1" else 0
                    state[f"{before}{name}.weight"] = weights["embed.weight"].chunk(tp, axis)[rank]
                if first + size == 4:
                    state[f"{before}norm.weight"] = weights["norm.weight"]
                    name = "output" if second else "head"
                    state[f"{before}{name}.weight"] = weights["head.weight"].chunk(tp)[rank]
            torch.save(
                {name: tensor.clone() for name, tensor in state.items()}, folder / f"model_tp{rank}_pp{stage}.pt"
            )


def built(kind: str) -> Transformer:
    second = kind == "internlm2"
    model = Transformer(replace(SHAPE, n_kv_heads=2, attention_bias=False) if second else SHAPE)
    model.init_weights(0)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(param.numel())))
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("v0.2.1", (2, 2)), ("v0.2.1", (1, 1)), ("internevo", (4, 1)), ("internevo", (2, 2, 2)), ("internlm2", (2, 4)),
    ],
)  # fmt: skip
def test_merged_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, layout: tuple[int, ...]) -> None:
    model, folder = built(kind), tmp_path / "1000"
    folder.mkdir()
    write(folder, model, kind, *layout)
    export.import_model(ExportConfig(from_internlm=str(folder), out=str(tmp_path / "run")))
    monkeypatch.setattr("export.verify", lambda *_, **__: "")
    export.export(ExportConfig(run=str(tmp_path / "run"), out=str(tmp_path / "hf"), dtype=Dtype.fp32))
    tokens = torch.arange(48).reshape(2, 24)
    with torch.no_grad():
        expected = model(tokens)
        for path in ("run", "hf"):
            assert torch.equal(open_saved(tmp_path / path).build("cpu")(tokens), expected)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda f: (f / "model_tp0_pp0.pt").unlink(), "1 of 2 files"),
        (lambda f: (f / "model_tp1_pp0.pt").unlink(), r"embed\.weight is \(32, 32\)"),
        (lambda f: save_config(f / "model_config.pt", {**ABOUT, "norm_type": "layernorm"}), r"norm_type \(layernorm\)"),
        (lambda f: torch.save({"mlp.experts.0.w": torch.ones(1)}, f / "model_tp0_pp0.pt"), "no place for tensor mlp"),
        (lambda f: torch.save({"x": Malicious()}, f / "model_tp0_pp0.pt"), "model_tp0_pp0.pt has Python objects"),
    ],
)
def test_unmergeable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, named: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, built("internevo"), "internevo", 2, 1)
    change(tmp_path)
    with pytest.raises(ModelError, match=named):
        export.import_model(ExportConfig(from_internlm=str(tmp_path), out=str(tmp_path / "run")))
    assert not (tmp_path / "owned").exists() and not (tmp_path / "run").exists()
