"""Overhead of the engine over a bare training step: python -m benchmarks.engine [--case 7b_16k] [--seconds 20]

The bare step runs the same compiled model, loss and update, without meshes, sources, loss scale or nonfinite checks,
on batches that are already on the device. Both alternate on the same weights.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor

from benchmarks.batches import micro_batches
from benchmarks.timing import synchronize, where
from benchmarks.train_step import CASES, build, configure
from model.loss import linear_cross_entropy
from parallel.engine import Engine
from parallel.mesh import Mesh


def bare_step(engine: Engine, batches: list[dict[str, Tensor]], max_seq_len: int, chunk_tokens: int) -> None:
    """Run forward, backward, gradient norm, and the clipped update."""
    targets = sum((batch["labels_BT"] != -100).sum() for batch in batches)
    for batch in batches:

        def head(h_BTD: Tensor, weight_VD: Tensor, batch: dict[str, Tensor] = batch) -> Tensor:
            labels_N = batch["labels_BT"].flatten()
            weights_N = torch.ones_like(labels_N, dtype=torch.float32) / targets
            return linear_cross_entropy(h_BTD.flatten(0, 1), weight_VD, labels_N, weights_N, chunk_tokens=chunk_tokens)[
                0
            ]

        engine.model(
            batch["tokens_BT"],
            positions_BT=batch["positions_BT"],
            cu_seqlens=batch["cu_seqlens"],
            max_seq_len=max_seq_len,
            head=head,
        ).backward()
    norm = torch.nn.utils.get_total_norm([param.grad for param in engine.params.values() if param.grad is not None])
    engine.optimizer.step(grad_scale=norm.float().clamp(min=1.0), finite=torch.isfinite(norm), on_updated=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="7b_16k", choices=list(CASES))
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    documents, overrides = CASES[arguments.case]
    config = configure((*overrides, *arguments.overrides))
    engine = build(config, Mesh(device=device))
    source = micro_batches(config.model.vocab_size, config.data.micro_batch_size, config.data.seq_len, documents)
    batches = list(islice(source, config.grad_accum_steps()))
    names = ("tokens_BT", "labels_BT", "positions_BT", "cu_seqlens")
    on_device = [{name: getattr(batch, name).to(device) for name in names} for batch in batches]
    if device.type == "cuda":
        batches = [batch.pin_memory() for batch in batches]
    longest, chunk_tokens = max(batch.max_seq_len for batch in batches), config.loss.chunk_tokens

    def timed(step: Callable[[], object], times: int = 3) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(times):  # the host can run ahead of the device, as in training
            step()
        synchronize(device)
        return (time.perf_counter() - start) / times

    steps = (lambda: engine.train_step(batches), lambda: bare_step(engine, on_device, longest, chunk_tokens))
    for step in steps:
        timed(step)
    pairs, end = [], time.perf_counter() + arguments.seconds
    while len(pairs) < 3 or time.perf_counter() < end:
        pairs.append([timed(step) for step in steps])
    engine_s, bare_s = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{where(device)}; {arguments.case}, {config.global_batch_tokens:,} tokens per step, {len(pairs)} pairs")
    for name, seconds in (("engine", engine_s), ("bare", bare_s)):
        print(f"{name:6} {seconds * 1e3:9.1f} ms {config.global_batch_tokens / seconds:9,.0f} tokens/s")
    print(f"engine / bare: {ratio:.3f} of the time (median of the pairs)")


if __name__ == "__main__":
    main()
