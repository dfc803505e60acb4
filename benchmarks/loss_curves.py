"""Loss curves by precision: python -m benchmarks.loss_curves [--model 1b] [--steps 200] [--out docs/images]

Trains the same weights on the same batches of the built-in corpus: in eager PyTorch (bf16 weights copied from fp32
masters, torch.optim.AdamW on the masters, full logits in fp32), with the engine in bf16, with bf16 moments, and with
fp8 products. Prints the final losses and plots the curves.
"""

import argparse
import gc
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.batches import micro_batches
from benchmarks.timing import where
from benchmarks.train_step import build, configure, draw_weights
from conf.schema import TrainConfig
from model.transformer import Transformer
from parallel.mesh import Mesh
from parallel.parallelize import ParallelModel
from parallel.shards import whole_params
from training.schedules import learning_rate


def rates(config: TrainConfig) -> list[float]:
    lr = config.optimizer.lr
    return [learning_rate(i, steps=config.steps, lr=lr, config=config.scheduler) for i in range(config.steps)]


def train_eager(config: TrainConfig, device: torch.device) -> list[float]:
    """Train in eager PyTorch without the engine; return the losses."""
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = Transformer(config.model)
    torch.set_default_dtype(torch.float32)
    parts: Any = [model], whole_params(model), set(), None, Mesh(device), config.parallel
    draw_weights(ParallelModel(model, *parts), config.seed)
    params, masters = list(model.parameters()), [p.detach().float().requires_grad_() for p in model.parameters()]
    c = config.optimizer
    optimizer = torch.optim.AdamW(masters, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=c.weight_decay)
    source = micro_batches(config.model.vocab_size, config.data.micro_batch_size, config.data.seq_len, "pile")
    losses = []
    for lr in rates(config):
        total = torch.zeros((), device=device)
        batches = list(islice(source, config.grad_accum_steps()))
        targets = sum(int((b.labels_BT >= 0).sum()) for b in batches)
        for b in batches:
            logits = model(
                b.tokens_BT.to(device), positions_BT=b.positions_BT.to(device),
                cu_seqlens=b.cu_seqlens.to(device), max_seq_len=b.max_seq_len,
            )  # fmt: skip
            labels = b.labels_BT.flatten().long().to(device)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum") / targets
            loss.backward()
            total += loss.detach()
        for param, master in zip(params, masters, strict=True):
            assert param.grad is not None
            master.grad, param.grad = param.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, c.max_grad_norm)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        with torch.no_grad():
            for param, master in zip(params, masters, strict=True):
                param.copy_(master)
        losses.append(total)
    return torch.stack(losses).tolist()


def train_engine(config: TrainConfig, device: torch.device) -> list[float]:
    engine = build(config, Mesh(device=device))
    engine.optimizer.set_schedule([(lr, config.optimizer.beta2) for lr in rates(config)])  # type: ignore[attr-defined]
    source = micro_batches(config.model.vocab_size, config.data.micro_batch_size, config.data.seq_len, "pile")
    return [float(engine.train_step(list(islice(source, config.grad_accum_steps()))).loss) for _ in range(config.steps)]


def plot(curves: dict[str, list[float]], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    first = next(iter(curves.values()))
    for name, losses in curves.items():
        above.plot(losses, label=name, linewidth=1)
        below.plot([a - b for a, b in zip(losses, first, strict=True)], linewidth=1)
    above.set(ylabel="loss", title=title)
    above.legend()
    below.set(ylabel="difference from the first", xlabel="step")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1b")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=4, help="per micro-batch; a step has two micro-batches")
    parser.add_argument("--row-len", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n_tokens = 2 * arguments.row_len * arguments.rows
    settings = (
        f"model={arguments.model}", f"steps={arguments.steps}", f"data.seq_len={arguments.row_len}",
        "optimizer.lr=3e-4", "optimizer.decay=all", "model.init=llama", "scheduler.warmup_ratio=0.1",
        f"data.micro_batch_size={arguments.rows}", f"global_batch_tokens={n_tokens}",
    )  # fmt: skip
    variants = {
        "plain eager PyTorch, fp32 masters": (train_eager, ("parallel.compile=none",)),
        "engine, bf16": (train_engine, ()),
        "engine, bf16 moments": (train_engine, ("optimizer.state_dtype=bf16",)),
        "engine, fp8 products": (train_engine, ("precision.fp8=tensorwise",)),
    }
    print(f"{where(device)}; {arguments.model}, {n_tokens:,} tokens per step")
    curves: dict[str, list[float]] = {}
    for name, (train, extra) in variants.items():
        if device.type != "cuda" and "fp8" in name:
            continue
        start = time.perf_counter()
        curves[name] = train(configure((*settings, *extra)), device)
        last = sum(curves[name][-10:]) / 10
        first = sum(next(iter(curves.values()))[-10:]) / 10
        print(
            f"{name:36} last 10 steps {last:.4f} ({last - first:+.4f})  {time.perf_counter() - start:.0f} s", flush=True
        )
        gc.collect()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "loss_curves.json").write_text(json.dumps(curves), encoding="utf-8")
    title = f"{arguments.model}, {n_tokens:,} tokens per step, the built-in corpus"
    plot(curves, title, arguments.out / "loss_curves.png")


if __name__ == "__main__":
    main()
