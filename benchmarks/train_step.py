"""Speed of a training step: python -m benchmarks.train_step [--cases 7b_16k,7b_65k] [--seconds 20] [--json file]

Each case is a full step of the engine (forward, backward, clipping, AdamW on fp32 masters) on tokens of the built-in
corpus, which must be prepared. The model's matrix products are timed first, as the upper bound of the step's speed.
"""

import argparse
import gc
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from benchmarks.batches import micro_batches
from benchmarks.timing import synchronize, where
from conf.cli import CONF
from conf.schema import TrainConfig, register, to_config
from model.config import ModelConfig
from model.counts import flops_per_token, internlm_flops_per_token
from parallel.engine import Engine
from parallel.mesh import Mesh
from parallel.parallelize import ParallelModel
from training.report import peak_tflops
from training.setup import build_engine, build_model
from training.state import TrainState

TUTORIAL = ("optimizer.decay=all", "loss.reduction=micro_batch_mean")
SEVEN = ("model=7b", *TUTORIAL)
BF16_STATES = "optimizer.state_dtype=bf16"


def batch(seq_len: int, rows: int, micro_batches: int) -> tuple[str, ...]:
    tokens = seq_len * rows * micro_batches
    return f"data.seq_len={seq_len}", f"data.micro_batch_size={rows}", f"global_batch_tokens={tokens}"


# name: documents, overrides
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "7b_16k": ("equal", (*SEVEN, *batch(2048, 4, 2))),
    "7b_65k": ("equal", (*SEVEN, *batch(2048, 4, 8))),
    "7b_65k_bf16_states": ("equal", (*SEVEN, *batch(2048, 8, 4), BF16_STATES)),
    "7b_65k_pile": ("pile", (*SEVEN, *batch(2048, 8, 4), BF16_STATES)),
    "7b_65k_fp8": ("equal", (*SEVEN, *batch(2048, 4, 8), BF16_STATES, "precision.fp8=tensorwise")),
    "7b_65k_fp8_rowwise": ("equal", (*SEVEN, *batch(2048, 4, 8), BF16_STATES, "precision.fp8=rowwise")),
    "internlm2_7b": ("equal", ("model=internlm2_7b", *TUTORIAL, *batch(2048, 4, 8), BF16_STATES)),
    "llama3_8b": ("equal", ("model=llama3_8b", *TUTORIAL, *batch(8192, 1, 8), BF16_STATES)),
    "1b": ("equal", ("model=1b", *TUTORIAL, *batch(2048, 8, 4))),
    "125m_1k": ("equal", ("model=125m", *TUTORIAL, *batch(1024, 1, 1))),
    "125m_1k_pile": ("pile", ("model=125m", *TUTORIAL, *batch(1024, 1, 1))),
    "125m": ("equal", ("model=125m", *TUTORIAL, *batch(512, 1, 1), "precision=fp32")),
}


def configure(overrides: tuple[str, ...]) -> TrainConfig:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config: TrainConfig = to_config(compose("train", overrides=["data=random", *overrides]))
    return config


@torch.no_grad()
def draw_weights(model: ParallelModel, seed: int = 0) -> None:
    """Draw random weights on the device, with the standard deviations of `init_weights` but much faster."""
    stds = model.module.init_stds()
    generator = torch.Generator(next(iter(model.params.values())).shard.device).manual_seed(seed)
    for name, param in model.params.items():
        std = stds[name]
        if std is None:
            param.shard.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        else:
            param.shard.normal_(0.0, std, generator=generator)


def build(config: TrainConfig, mesh: Mesh) -> Engine:
    """Build the engine as train.py does, with `draw_weights` and a constant learning rate."""
    engine = build_engine(config, build_model(config, mesh, draw_weights), TrainState(device=mesh.device))
    engine.optimizer.set_schedule([(config.optimizer.lr, config.optimizer.beta2)] * 10_000)
    return engine


def products(model: ModelConfig) -> list[tuple[int, int, int]]:
    """Return the weight matrices: rows, columns, count."""
    d, kv, n = model.d_model, model.n_kv_heads * model.head_dim, model.n_layers
    return [(d, d, 2 * n), (kv, d, 2 * n), (model.d_ff, d, 2 * n), (d, model.d_ff, n), (model.vocab_size, d, 1)]


def gemm_tflops(model: ModelConfig, tokens: int, device: torch.device, seconds: float) -> float:
    """Return the rate of the model's matrix products, forward and both gradients, as often as in a step."""
    total_s, flops, shapes = 0.0, 0.0, products(model)
    for rows, columns, times in shapes:
        n = min(tokens, 4096) if rows == model.vocab_size else tokens  # the head works in chunks
        x, w, y = (
            torch.randn(s, device=device, dtype=torch.bfloat16) for s in ((n, columns), (rows, columns), (n, rows))
        )

        def products_of(x: Tensor = x, w: Tensor = w, y: Tensor = y) -> None:
            _ = x @ w.T, y @ w, y.T @ x

        products_of()
        synchronize(device)
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / len(shapes):
            for _ in range(5):
                products_of()
            done += 5
            synchronize(device)
        total_s += (time.perf_counter() - start) / done * times * tokens / n
        flops += 6 * rows * columns * tokens * times
    return flops / total_s / 1e12


def measure(name: str, mesh: Mesh, seconds: float, extra: tuple[str, ...]) -> dict[str, Any]:
    """Time one case."""
    documents, overrides = CASES[name]
    config = configure((*overrides, *extra))
    device, tokens = mesh.device, config.global_batch_tokens
    ceiling = (
        gemm_tflops(config.model, config.micro_batch_tokens, device, seconds / 4) if device.type == "cuda" else None
    )
    engine = build(config, mesh)
    rows, accumulated = config.data.micro_batch_size, config.grad_accum_steps()
    source = micro_batches(config.model.vocab_size, rows, config.data.seq_len, documents)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    losses = [engine.train_step(list(islice(source, accumulated))).loss for _ in range(2)]
    synchronize(device)
    first_s = time.perf_counter() - start
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        batches = [b.pin_memory() if device.type == "cuda" else b for b in islice(source, accumulated)]
        losses.append(engine.train_step(batches).loss)
        steps += 1
        if steps % 2 == 0:
            synchronize(device)
    synchronize(device)
    step_s = (time.perf_counter() - start) / steps
    tgs = tokens / step_s
    causal, internlm = (
        f(config.model, config.data.seq_len) / 1e12 for f in (flops_per_token, internlm_flops_per_token)
    )
    peak = peak_tflops(device)
    product_flops = sum(6 * rows * columns * times for rows, columns, times in products(config.model)) / 1e12
    return {
        "case": name, "overrides": [*overrides, *extra], "steps": steps,
        "tokens_per_step": tokens, "step_s": step_s, "tokens_per_s": tgs,
        "tflops_internlm": tgs * internlm, "tflops_causal": tgs * causal, "mfu": tgs * causal / peak if peak else None,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "gemm_tflops": ceiling, "share_of_products": tgs * product_flops / ceiling if ceiling else None,
        "first_two_steps_s": first_s, "loss_first": float(losses[0]), "loss_last": float(losses[-1]),
    }  # fmt: skip


def line(result: dict[str, Any]) -> str:
    mfu, gib, gemm = result["mfu"], result["memory_gib"], result["gemm_tflops"]
    share = result["share_of_products"]
    return (
        f"{result['case']:20} {result['tokens_per_step']:8,} {result['tokens_per_s']:9,.0f} "
        f"{result['tflops_internlm']:9.1f} {result['tflops_causal']:8.1f} "
        f"{f'{mfu:7.1%}' if mfu else '      -'} {f'{gib:7.1f}' if gib else '      -'} "
        f"{f'{gemm:6.0f} {share:9.1%}' if gemm else ''}"
    )


HEADER = "case                 tok/step  tokens/s  InternLM   causal     MFU     GiB   GEMM of a step"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="7b_16k,7b_65k,7b_65k_bf16_states,7b_65k_pile,7b_65k_fp8")
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of the timed steps of a case")
    parser.add_argument("--json", type=Path, help="file to append a line of results to per case")
    parser.add_argument("overrides", nargs="*", help="settings for all cases, such as loss.chunk_tokens=8192")
    arguments = parser.parse_args()
    on_cuda = torch.cuda.is_available()
    mesh = Mesh(device=torch.device("cuda", 0) if on_cuda else torch.device("cpu"))
    print(f"{where(mesh.device)}; TFLOP/s by InternLM's formula and by exact causal count\n{HEADER}")
    for case in arguments.cases.split(","):
        try:
            result = measure(case, mesh, arguments.seconds, tuple(arguments.overrides))
        except torch.OutOfMemoryError as error:
            print(f"{case:20} out of memory: {str(error).splitlines()[0]}", flush=True)
        else:
            print(line(result), flush=True)
            if arguments.json is not None:
                with arguments.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
        gc.collect()
        if on_cuda:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
