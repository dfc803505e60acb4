"""Scaling efficiency on several GPUs by layout, compared with torchtitan, in one run:

    python -m benchmarks.multi_gpu [--rows zero1,tp] [--seconds 5] [--no-peer] [overrides]

It starts a rank per GPU, or runs as a rank of torchrun. The single-GPU rate is measured on all GPUs at the same time,
before and after each row, because GPUs slow down as they warm up; the mean counts. Random tokens, sequences of 2,048
unless a row has others, AdamW with fp32 masters and moments, no recomputation. `hybrid_zero` has no row: `dp_shard=2`
on two GPUs is `zero1`. torchtitan has fp32 parameters (bf16 with tp alone, where it cannot mix them), bf16 compute and
a compiled `parallelize_llama`, which has no pipeline; it has no row in 8 bits either. On CPUs, --tiny runs the same
rows with small shapes.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import start_ranks, synchronize, where
from benchmarks.train_step import build, configure
from conf.schema import ConfigError
from data.batches import Batch
from parallel.mesh import Mesh, distributed
from training.report import memory_gib

SEVEN = ("model=7b", "model.n_layers=12")
ONE_B = ("model=1b",)
TINY = ("model=tiny", "model.n_layers=2", "model.vocab_size=512")


@dataclass(frozen=True)
class Row:
    model: tuple[str, ...]
    seq_len: int
    rows: int
    micro_batches: int
    layout: tuple[str, ...] = ()
    base: str = ""  # the single-GPU row to compare with
    target: float = 0.0  # scaling efficiency
    peer: tuple[str, ...] = ()  # torchtitan's arguments: reshard after forward, tp, cp
    peer_target: float = 0.0
    bound: float = 1.0  # efficiency limit of the schedule


ROWS = {
    "one_1b": Row(ONE_B, 2048, 4, 1),
    "one_1b_x4": Row(ONE_B, 2048, 4, 4),
    "one_1b_x8": Row(ONE_B, 2048, 4, 8),
    "one_1b_32k": Row((*ONE_B, "model.max_seq_len=32768"), 32768, 1, 1),
    "one_7b_4k": Row(SEVEN, 2048, 2, 1),
    "one_7b_8k": Row(SEVEN, 2048, 4, 1),
    "one_7b_8k_fp8": Row((*SEVEN, "precision.fp8=tensorwise"), 2048, 4, 1),
    "zero1": Row(ONE_B, 2048, 4, 1, ("parallel=zero1",), "one_1b", 0.97, ("never", "1"), 1.15),
    "zero1_x4": Row(ONE_B, 2048, 4, 4, ("parallel=zero1",), "one_1b_x4", 0.97, ("never", "1"), 1.15),
    "zero3": Row(ONE_B, 2048, 4, 1, ("parallel=zero3",), "one_1b", 0.95, ("always", "1"), 1.15),
    "zero3_x4": Row(ONE_B, 2048, 4, 4, ("parallel=zero3",), "one_1b_x4", 0.95, ("always", "1"), 1.15),
    "zero3_7b": Row(SEVEN, 2048, 2, 1, ("parallel=zero3",), "one_7b_4k", 0.95, ("always", "1"), 1.20),
    "tp": Row(ONE_B, 2048, 4, 1, ("parallel=tp",), "one_1b", 0.85, ("never", "2"), 1.25),
    "tp_7b": Row(SEVEN, 2048, 4, 1, ("parallel=tp",), "one_7b_8k", 0.92, ("never", "2"), 1.15),
    "cp": Row(
        (*ONE_B, "model.max_seq_len=32768"), 32768, 1, 1, ("parallel=cp",), "one_1b_32k", 0.90, ("never", "1", "2"),
        1.15,
    ),
    "pp": Row(ONE_B, 2048, 4, 8, ("parallel=pp",), "one_1b_x8", 0.97, bound=8 / 9),
    "zero1_7b_fp8": Row(
        (*SEVEN, "precision.fp8=tensorwise"), 2048, 4, 1, ("parallel=zero1",), "one_7b_8k_fp8", 0.95
    ),
}  # fmt: skip


def shrink(row: Row) -> Row:
    """Return a row that takes a second on two cores."""
    return replace(row, model=(*TINY, "precision=fp32"), seq_len=64, rows=1)


def settings(row: Row, n_gpus: int, extra: tuple[str, ...]) -> tuple[list[str], int]:
    """Return a row's overrides and tokens per step; ranks of tp, cp and pp have the same micro-batches."""
    sharded = any(layout in name for name in row.layout for layout in ("zero", "ddp"))
    tokens = row.seq_len * row.rows * row.micro_batches * (n_gpus if sharded else 1)
    batch = [f"data.seq_len={row.seq_len}", f"data.micro_batch_size={row.rows}", f"global_batch_tokens={tokens}"]
    return [*row.model, *batch, *row.layout, *extra], tokens


def random_batches(config: Any, seed: int, count: int, device: torch.device) -> Callable[[], list[Batch]]:
    rows, length, random = config.data.micro_batch_size, config.data.seq_len, torch.Generator().manual_seed(seed)
    positions_BT = torch.arange(length, dtype=torch.int32).expand(rows, length).contiguous()
    cu_seqlens = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32)

    def random_batch() -> Batch:
        shape = (rows, length + 1)
        x = torch.randint(0, config.model.vocab_size, shape, generator=random, dtype=torch.int32)
        batch = Batch(
            tokens_BT=x[:, :-1].contiguous(), labels_BT=x[:, 1:].contiguous(), positions_BT=positions_BT,
            source_BT=torch.zeros(rows, length, dtype=torch.int32), cu_seqlens=cu_seqlens, max_seq_len=length,
        )  # fmt: skip
        return batch.pin_memory() if device.type == "cuda" else batch

    return lambda: [random_batch() for _ in range(count)]


def measure(row: Row, n_gpus: int, seconds: float, extra: tuple[str, ...]) -> dict[str, float]:
    """Return tokens/s per GPU, milliseconds and GiB of a row."""
    overrides, tokens = settings(row, n_gpus if row.base else 1, extra)
    config = configure(tuple(overrides))
    if row.base:
        with distributed(config.parallel) as mesh:
            return _time(config, mesh, tokens / n_gpus, seconds)
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return _time(config, Mesh(device=device), tokens, seconds)


def _time(config: Any, mesh: Mesh, tokens_per_gpu: float, seconds: float) -> dict[str, float]:
    engine = build(config, mesh)
    per_rank = config.global_batch_tokens // (config.micro_batch_tokens * mesh.dp_size)
    batches = random_batches(config, mesh.dp_rank, per_rank, mesh.device)
    return timed(lambda: engine.train_step(batches()), mesh.device, tokens_per_gpu, seconds, mesh.all_reduce_max)


def timed(
    step: Callable[[], object], device: torch.device, tokens_per_gpu: float, seconds: float,
    all_reduce_max: Callable[[int], int],
) -> dict[str, float]:  # fmt: skip
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    synchronize(device)
    begin = time.perf_counter()
    step()
    synchronize(device)
    n_steps = all_reduce_max(max(2, round(seconds / (time.perf_counter() - begin))))
    begin = time.perf_counter()
    for _ in range(n_steps):
        step()
    host_s = (time.perf_counter() - begin) / n_steps
    synchronize(device)
    step_s = (time.perf_counter() - begin) / n_steps
    gib = memory_gib() if device.type == "cuda" else 0.0
    return {"tokens_per_s": tokens_per_gpu / step_s, "ms": step_s * 1e3, "host_ms": host_s * 1e3, "gib": gib}


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def columns(m: dict[str, float]) -> str:
    return f"{m['tokens_per_s']:12,.0f} {m['ms']:8.2f} {m['host_ms']:8.2f} {m['gib']:6.1f}"


def write(found: dict[str, dict[str, float]], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(name for name, row in ROWS.items() if row.base))
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--no-peer", action="store_true", help="without torchtitan")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="settings of multi-GPU rows")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        sys.exit(start_ranks("benchmarks.multi_gpu"))
    rank, n_gpus = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rows = {name: shrink(row) if args.tiny else row for name, row in ROWS.items()}
    selected = args.rows.split(",")
    found: dict[str, dict[str, float]] = {}
    if rank == 0:
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        print(f"{n_gpus} x {where(device)}")
        print(f"{'row':14} {'tokens/s/GPU':>12} {'ms':>8} {'host ms':>8} {'GiB':>6} {'scaling':>7} {'target':>7}")

    def run(name: str) -> float | None:
        """Measure a row; return its rate, or None if a single GPU cannot run it."""
        row = rows[name]
        try:
            found[name] = measure(row, n_gpus, args.seconds, tuple(args.overrides) if row.base else ())
        except ConfigError as error:  # with these overrides, on all ranks
            if rank == 0:
                print(f"{name:14} {error}", flush=True)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            print(f"{name:14} rank {rank}: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
            if row.base:
                raise
        free_memory()
        if rank == 0 and name in found:
            print(f"{name:14} {columns(found[name])}", flush=True)
        return found.get(name, {}).get("tokens_per_s")

    base, before = "", None
    for name in selected:
        row = rows[name]
        before = before if row.base == base else run(row.base)
        rate, after, base = run(name), run(row.base), row.base
        if rank == 0:
            if rate and before and after:
                kept = found[name]["kept"] = rate / ((before + after) / 2) / row.bound
                print(f"{name:14} {'':37} {kept:7.1%} {row.target:7.0%}", flush=True)
            write(found, args.json)
        before = after
    if not args.no_peer:
        from benchmarks.torchtitan_step import measure as measure_torchtitan

        for name in selected:
            if not (row := rows[name]).peer or name not in found:
                continue
            shape = row.seq_len, row.rows, row.micro_batches
            metrics = measure_torchtitan(row.model, *shape, args.seconds, *row.peer)
            free_memory()
            if rank == 0:
                found[f"torchtitan_{name}"] = metrics
                ratio = found[name]["tokens_per_s"] / metrics["tokens_per_s"]
                text = f"{columns(metrics)}  ratio {ratio:.2f}, target {row.peer_target or '-'}"
                print(f"torchtitan {name:9} {text}", flush=True)
                write(found, args.json)


if __name__ == "__main__":
    main()
