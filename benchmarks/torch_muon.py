"""Muon compared with torch.optim.Muon + AdamW on a plain model: the `plain` command of benchmarks.optimizers.

Both models have the same initial weights and batches, in fp32 and in bf16 (autocast in the plain model). In fp32 the
losses are equal up to rounding.
"""

import argparse
import gc
import statistics
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.optimizer import update_ms
from benchmarks.optimizers import Results, batch_settings, build, open_mesh, settings
from benchmarks.plain import Plain
from benchmarks.timing import where
from conf.schema import TrainConfig
from data.dataset import open_corpus
from parallel.engine import Engine
from training.setup import build_train_batches, lr_schedule
from training.state import TrainState


class Joined(nn.ModuleList):
    """Linear layers with concatenated outputs and separate weights, as Muon needs them."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self], dim=-1)


def plain_twin(config: TrainConfig, engine: Engine) -> Plain:
    """Return the plain model with the same fp32 weights."""
    model, device, optimizer = Plain(config.model), engine.mesh.device, engine.optimizer
    weights = {name: optimizer.weights.read(name) for name in optimizer.params}

    def linear(names: Sequence[str]) -> nn.Module:
        parts = []
        for name in names:
            weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
            part = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=device)
            part.weight.data.copy_(weight)
            if bias is not None:
                part.bias.data.copy_(bias)
            parts.append(part)
        return Joined(parts) if len(parts) > 1 else parts[0]

    for number, layer in enumerate[Any](model.layers):
        path = f"blocks.{number}"
        layer.qkv = linear([f"{path}.attention.{key}" for key in ("wq", "wk", "wv")])
        layer.out = linear([f"{path}.attention.wo"])
        layer.gate_up = linear([f"{path}.mlp.w_gate", f"{path}.mlp.w_up"])
        layer.down = linear([f"{path}.mlp.w_down"])
        layer.norm1.weight.data.copy_(weights[f"{path}.attention_norm.weight"])
        layer.norm2.weight.data.copy_(weights[f"{path}.mlp_norm.weight"])
    for module, name in ((model.embed, "embed"), (model.norm, "norm"), (model.head, "head")):
        module.weight.data.copy_(weights[f"{name}.weight"])
    return model.to(device)


def torch_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return torch's Muon for the matrices of the layers and AdamW for the rest."""
    c, named = config.optimizer, list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and name.startswith("layers.")]
    tables = [p for name, p in named if p.ndim == 2 and not name.startswith("layers.")]
    groups = [{"params": tables, "weight_decay": c.weight_decay},
              {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    muon = torch.optim.Muon(matrices, lr=c.lr, weight_decay=c.weight_decay, momentum=c.momentum,
                            adjust_lr_fn="match_rms_adamw")  # fmt: skip
    used = [group for group in groups if group["params"]]
    fused = {"lr": c.lr, "betas": (c.beta1, c.beta2), "eps": c.eps, "fused": True}
    return [muon, torch.optim.AdamW(used, **fused)] if used else [muon]


def plain(arguments: argparse.Namespace) -> None:
    """Train both models on the same batches, and time both updates."""
    mesh, about = open_mesh(), {"steps": arguments.steps, "model": arguments.model}
    results = Results(arguments.out / "plain.json", about, arguments.copy)
    shape = batch_settings(arguments.batch_tokens, arguments.micro_rows, arguments.seq_len)
    common = (f"model={arguments.model}", "model.init=llama", "optimizer=muon", f"optimizer.lr={arguments.rate}",
              f"steps={arguments.steps}", *shape, *arguments.overrides)  # fmt: skip
    for precision in ("fp32", "bf16"):
        config = settings(arguments.corpus, *common, f"precision={precision}")
        corpus, state = open_corpus(config.data, vocab_size=config.model.vocab_size), TrainState(device=mesh.device)
        engine = build(config, mesh, corpus, state)
        twin, device = plain_twin(config, engine), mesh.device
        references, losses, accumulated = torch_optimizers(twin, config), [], config.grad_accum_steps()
        schedule = [rate for rate, _ in lr_schedule(config, state)]
        with closing(build_train_batches(config, mesh, corpus, state)) as batches:
            for step, batch in enumerate(islice(batches, arguments.steps)):
                for micro in batch:  # the plain model has one document per row
                    micro.labels_BT[micro.labels_BT == -100] = 0
                    positions_T = torch.arange(micro.tokens_BT.shape[1], dtype=torch.int32)
                    micro.positions_BT = positions_T.expand_as(micro.tokens_BT).contiguous()
                    rows, length = micro.tokens_BT.shape
                    micro.cu_seqlens = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
                    micro.max_seq_len = length
                loss = engine.train_step(batch).loss
                total = torch.zeros((), device=device)
                for micro in batch:
                    tokens, labels = micro.tokens_BT.to(device).long(), micro.labels_BT.to(device).long()
                    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                        part = twin(tokens, labels) / accumulated
                    part.backward()
                    total += part.detach()
                torch.nn.utils.clip_grad_norm_(twin.parameters(), config.optimizer.max_grad_norm)
                for reference in references:
                    for group in reference.param_groups:
                        group["lr"] = schedule[step]
                    reference.step()
                twin.zero_grad(set_to_none=True)
                losses.append([float(loss), float(total)])
        gaps = [abs(a - b) for a, b in losses]
        print(f"{precision}: {arguments.steps} steps, loss {losses[0][0]:.4f} to {losses[-1][0]:.4f}, in plain "
              f"PyTorch with torch.optim.Muon {losses[0][1]:.4f} to {losses[-1][1]:.4f}; largest difference "
              f"{max(gaps):.2e}, mean {statistics.mean(gaps):.2e}", flush=True)  # fmt: skip
        results.add({"where": where(device), "precision": precision, "losses": losses, "largest": max(gaps)})
        if precision == "bf16":
            took = update_ms(engine.optimizer, device), update_ms(references, device)
            print(f"update of {arguments.model}: this project {took[0]:.2f} ms, "
                  f"torch.optim.Muon + AdamW {took[1]:.2f} ms, ratio {took[0] / took[1]:.2f}", flush=True)  # fmt: skip
            results.add({"update_ms": took})
        del engine, twin, references
        gc.collect()
