"""Speed of 7B on a node of N GPUs by layout, compared with the dry run's predictions, in one command:

    python -m benchmarks.node [--rows zero1,tp8] [--seconds 2] [overrides]

It prepares the built-in corpus and starts a rank per GPU, or runs as a rank of `torchrun --max-restarts 9`. It measures
NCCL's bus bandwidth; a single GPU (with half of the layers if 7B does not fit); layouts with the shapes of
`experiment=7b_pile_small`, 16,384 real tokens per GPU and step in documents of The Pile's lengths (cp: one of 32,768),
in micro-batches of two sequences, or four (not in pipelines) with 100 GiB of memory; a checkpoint resumed in another
layout; and torchtitan. TFLOP/s are by InternLM's formula, MFU and scaling by the exact causal count.

Rows of tp come with what the links allow: the time of their messages at NCCL's measured bandwidth, and the rate of one
GPU with that time added (all messages exposed) or, as the floor of a step, with all of them hidden. The last column is
the rate over torchtitan's: "-" for a row without one (JSON: null), "..." until it is measured. All rows are printed
again at the end.

A failed row is reported, and the next one runs. If a row fails on some ranks only and the others hang, torchrun
restarts all ranks, which continue with the next row. The command fails if a row failed, or if the resumed checkpoint
has another loss. On CPUs, --tiny runs the same rows with small shapes.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from benchmarks import collectives
from benchmarks.batches import micro_batches, prepare
from benchmarks.checkpoint import save_and_load
from benchmarks.multi_gpu import TINY, Row, free_memory, timed
from benchmarks.timing import start_ranks, where
from benchmarks.train_step import SEVEN, build, configure
from conf.schema import TrainConfig
from data.batches import Batch
from dry_run.step_profile import profile_step
from model.counts import flops_per_token, internlm_flops_per_token
from parallel.axes import resolve_axes
from parallel.mesh import Mesh, distributed
from training.report import peak_tflops

TOKENS = 16_384  # per GPU and step
SCALE = 32  # divisor of sequence and message lengths with --tiny
SMALL = (*TINY, "model.n_layers=4", "model.n_heads=8", "model.n_kv_heads=8", "model.vocab_size=4096", "precision=fp32")
FP8 = (*SEVEN, "precision.fp8=tensorwise")
ON_CUDA = torch.cuda.is_available()
TP = ("parallel.async_tp=true", "parallel.cuda_graphs=true") if ON_CUDA else ()
IS_LARGE = ON_CUDA and torch.cuda.get_device_properties(0).total_memory > 100 * 2**30
DEVICE = torch.device("cuda", 0) if ON_CUDA else torch.device("cpu")
Figures = dict[str, Any]
SKIP: Figures = {"error": "not measured"}


def rows_of(n: int) -> dict[str, Row]:
    """Return the rows that N GPUs can run; `base` is the single-GPU row to compare with."""

    def row(*layout: str, model: tuple[str, ...] = SEVEN, base: str = "one", peer: tuple[str, ...] = ()) -> Row:
        rows = 4 if IS_LARGE or (TP and TP[0] in layout) else 2
        return Row(model, 2048, rows, 1, layout, base, peer=peer)

    long = row("parallel=cp", f"parallel.cp={n}", model=(*SEVEN, "model.max_seq_len=32768"))
    found = {
        "one": row(base=""),
        "one_fp8": row(model=FP8, base=""),
        "zero1": row("parallel=zero1", peer=("never", "1")),
        "hybrid_zero": row("parallel=hybrid_zero", f"parallel.dp_shard={n // 2}"),
        "zero3": row("parallel=zero3", peer=("always", "1")),
        "tp2_zero1": row("parallel=tp_zero1", *TP),
        f"tp{n}": row("parallel=tp", f"parallel.tp={n}", *TP, peer=("never", f"{n}")),
        "pp2_zero1": replace(row("parallel=zero1", "parallel.pp=2"), rows=2),
        "3d": replace(row("parallel=3d"), rows=2),
        f"cp{n}_32k": replace(long, seq_len=32768, rows=1),
        "zero1_fp8": row("parallel=zero1", model=FP8, base="one_fp8"),
    }
    return {name: row for name, row in found.items() if n >= 4 or name not in ("hybrid_zero", "tp2_zero1", "3d")}


def overrides_of(row: Row, n: int, args: argparse.Namespace) -> tuple[str, ...]:
    scale, model = (SCALE, SMALL) if args.tiny else (1, row.model)
    batch = (f"data.micro_batch_size={row.rows}", f"global_batch_tokens={n * TOKENS // scale}")
    return (*model, f"data.seq_len={row.seq_len // scale}", *batch, *row.layout, *args.overrides)


def per_rank(config: TrainConfig, dp: int) -> int:
    """Return the micro-batches per rank and step."""
    return config.global_batch_tokens // (config.micro_batch_tokens * dp)


def real_batches(config: TrainConfig, count: int) -> Callable[[], list[Batch]]:
    documents = "equal" if config.parallel.cp > 1 else "pile"
    source = micro_batches(config.model.vocab_size, config.data.micro_batch_size, config.data.seq_len, documents)
    return lambda: [batch.pin_memory() if ON_CUDA else batch for batch in islice(source, count)]


def measure(overrides: tuple[str, ...], seconds: float, *, single: bool = False) -> Figures:
    """Time a row on all ranks, or on this rank only."""
    config = configure((*overrides, "parallel.step_timeout_s=60"))
    with nullcontext(Mesh(device=DEVICE)) if single else distributed(config.parallel) as mesh:
        return timed_steps(config, mesh, seconds)


def timed_steps(config: TrainConfig, mesh: Mesh, seconds: float) -> Figures:
    engine, batches = build(config, mesh), real_batches(config, per_rank(config, mesh.dp_size))
    tokens = config.global_batch_tokens / mesh.world_size
    times = timed(lambda: engine.train_step(batches()), mesh.device, tokens, seconds, mesh.all_reduce_max)
    return times | rates(config, times["tokens_per_s"], mesh.device)


def rates(config: TrainConfig, tokens_per_s: float, device: torch.device) -> Figures:
    counts = (count(config.model, config.data.seq_len) for count in (internlm_flops_per_token, flops_per_token))
    internlm, causal = (tokens_per_s * flops / 1e12 for flops in counts)
    peak = peak_tflops(device)
    return {"tflops": internlm, "causal_tflops": causal, "mfu": causal / peak if peak else None}


def measure_one(overrides: tuple[str, ...], seconds: float) -> Figures:
    """Time a row on a single GPU, with half of the layers if it does not fit."""
    with suppress(torch.OutOfMemoryError):
        return measure(overrides, seconds, single=True)
    free_memory()
    return measure((*overrides, "model.n_layers=16"), seconds, single=True) | {"layers": 16}


def predict(overrides: tuple[str, ...], n: int) -> Figures:
    """Return the dry run's predictions of a row."""
    config = configure((*overrides, "dry_run='true'", f"dry_run.world_size={n}", f"dry_run.devices_per_node={n}"))
    axes = resolve_axes(config.parallel, n)
    profiles = profile_step(config, per_rank(config, axes.dp))
    slowest = max(profiles, key=lambda profile: profile.time.total_s)
    return {
        "predicted": config.global_batch_tokens / n / slowest.time.total_s,
        "predicted_gib": max(profile.peak_bytes for profile in profiles) / 2**30,
        "messages": [  # of a step: axis, kind, ranks, count, bytes
            (axis, kind, math.prod(getattr(axes, name) for name in axis.split("+")), *counts)
            for (axis, kind), counts in slowest.collectives.items()
        ],
    }


def links_of(m: Figures, bandwidth: dict[int, dict[str, float]]) -> Figures:
    """Return what the links allow a row of tp, given the bandwidth by number of ranks: ms of messages, tokens/s."""
    times = {"tp": 0.0, "all": 0.0}
    for axis, kind, ranks, count, n_bytes in m["messages"]:
        ms = 1e3 * collectives.seconds(bandwidth.get(ranks, bandwidth[max(bandwidth)]), kind, ranks, count, n_bytes)
        times["all"] += ms
        times["tp"] += ms if axis == "tp" else 0.0  # the other axes' messages run beside the compute
    tokens, compute_ms = m["tokens_per_s"] * m["ms"], m["ms"] * m["kept"]
    floor_ms = max(compute_ms, times["all"])
    rates = {"exposed_tokens_per_s": tokens / (compute_ms + times["tp"]), "hidden_tokens_per_s": tokens / floor_ms}
    return {"tp_ms": times["tp"], "all_ms": times["all"], "floor_ms": floor_ms, **rates}


def save_and_resume(overrides: tuple[str, ...], n: int, folder: Path) -> Figures:
    """Save a zero1 run and load it in another layout."""
    layouts = (("parallel=zero1",), ("parallel=tp_zero1", f"parallel.pp={2 if n >= 4 else 1}"))
    configs = [configure((*overrides, *layout, "checkpoint.asynchronous=true")) for layout in layouts]
    # The same micro-batches on all ranks, so that the loss does not depend on the layout
    same = real_batches(configs[0], per_rank(configs[0], n))()
    before, after = configs
    return save_and_load(before, after, lambda config, dp: same * (per_rank(config, dp) // len(same)), folder)


def measure_peer(row: Row, overrides: tuple[str, ...], seconds: float) -> Figures:
    from benchmarks.torchtitan_step import measure as measure_torchtitan

    count = TOKENS * math.prod(map(int, row.peer[1:])) // (row.seq_len * row.rows)
    times = measure_torchtitan(row.model, row.seq_len, row.rows, count, seconds, *row.peer)
    return times | rates(configure(overrides), times["tokens_per_s"], DEVICE)


def run_row(name: str, work: Callable[[], Figures], store: Any, rank: int, n: int) -> Figures | None:
    """Run a row and wait until all ranks finish it; return None if it failed on any.

    A failed rank waits 30 seconds for the others, which may hang in a collective, and then exits, which ends them all.
    """
    metrics, end, deadline = None, f"{name}/done", float("inf")
    try:
        metrics = work()
    except Exception as error:  # out of memory, or any error of a library
        text = (str(error).splitlines() or [""])[0][:300]
        print(f"{name:15} rank {rank}: {type(error).__name__}: {text}", flush=True)
        end, deadline = f"{name}/failed", time.monotonic() + 30
    free_memory()
    store.add(end, 1)
    while store.add(f"{name}/failed", 0) + store.add(f"{name}/done", 0) < n:
        if time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.1)
    return None if store.add(f"{name}/failed", 0) else metrics


def line_of(name: str, m: Figures, row: Row | None) -> str:
    """Return the lines of the table for a row, a peer, or all figures of another measurement."""
    if not m.get("equal", True):
        name = "NOT RESUMED:"
    if "tokens_per_s" not in m:
        return f"{name:15} " + ", ".join(
            f"{key} {value if isinstance(value, str) else format(value, '.6g')}" for key, value in m.items()
        )
    shares = [f"{value:8.1%}" if (value := m.get(key)) else f"{'-':>8}" for key in ("mfu", "kept")]
    line = f"{name:15} {m['tokens_per_s']:12,.0f} {m['tflops']:8.1f} {' '.join(shares)} {m['gib']:7.1f}"
    if row is None:  # a peer
        return line
    if "predicted" in m:
        line += f" {m['predicted_gib']:9.1f} {m['predicted']:10,.0f} {m['predicted'] / m['tokens_per_s']:6.2f}"
    else:
        line += f" {'-':>9} {'-':>10} {'-':>6}"
    over = f"{value:.2f}" if (value := m["over_torchtitan"]) else "..." if row.peer else "-"
    line += f" {over:>10}"
    if links := m.get("links"):
        line += (
            f"\n{'':15} links: messages of tp {links['tp_ms']:.1f} of {m['ms']:.1f} ms, which allow "
            f"{links['exposed_tokens_per_s']:,.0f} tokens/s exposed; floor {links['floor_ms']:.1f} ms, "
            f"{links['hidden_tokens_per_s']:,.0f} tokens/s, all hidden"
        )
    return line


def failures(found: dict[str, Figures]) -> list[str]:
    return [name for name, m in found.items() if "error" in m or not m.get("equal", True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="names, separated by commas (default: all)")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path, default=Path("node.json"), help="results, from which a restart continues")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "node_checkpoint"))
    parser.add_argument("overrides", nargs="*", help="settings of all rows, such as optimizer.state_dtype=bf16")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        prepare()
        code = start_ranks("benchmarks.node", restarts=9)
        sys.exit(code or bool(failures(json.loads(args.json.read_text(encoding="utf-8")))))
    rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rows, found = rows_of(n), dict[str, Figures]()
    overrides = {name: overrides_of(row, n if row.layout else 1, args) for name, row in rows.items()}
    single = {name for name, row in rows.items() if not row.layout}
    tp_rows, sizes = {"tp2_zero1", f"tp{n}"}, {"bandwidth": n} | ({"bandwidth2": 2} if n > 2 else {})
    no_peer = "--tiny" if args.tiny else "" if find_spec("torchtitan") else "not installed"
    peers = {} if no_peer else {f"torchtitan_{name}": name for name, row in rows.items() if row.peer}
    selected = args.rows.split(",") if args.rows else [*sizes, *rows, "checkpoint", *peers]
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    store = PrefixStore(f"node/{attempt}", next(rendezvous("env://"))[0])
    if rank == 0:
        prepare()
        shutil.rmtree(args.folder, ignore_errors=True)
        if attempt != "0":
            found = json.loads(args.json.read_text(encoding="utf-8"))
        print(f"{n} x {where(DEVICE)}; torchtitan: {no_peer or 'measured too'}")
        titles = f"{'MFU':>8} {'scaling':>8} {'GiB':>7} {'predicted':>9} {'tokens/s':>10} {'ratio':>6} torchtitan"
        print(header := f"{'row':15} {'tokens/s/GPU':>12} {'TFLOP/s':>8} {titles}", flush=True)
        bases = [rows[name].base for name in selected if name in rows and rows[name].base]
        bases += [key for key in sizes if tp_rows & {*selected}]
        store.set("names", json.dumps([name for name in dict.fromkeys([*bases, *selected]) if name not in found]))
    names = json.loads(store.get("names"))
    bandwidth = partial(collectives.measure, scale=SCALE if args.tiny else 1, times=20 if ON_CUDA else 2)
    works: dict[str, Callable[[], Figures]] = {
        "bandwidth": partial(bandwidth, n),
        "bandwidth2": partial(bandwidth, 2),
        "checkpoint": partial(save_and_resume, overrides_of(rows["one"], n, args), n, args.folder),
        **{peer: partial(measure_peer, rows[name], overrides[name], args.seconds) for peer, name in peers.items()},
        **{name: partial(measure_one if name in single else measure, overrides[name], args.seconds) for name in rows},
    }
    spawn, n_workers = multiprocessing.get_context("spawn"), max(1, (os.cpu_count() or 2) // 8)
    with ProcessPoolExecutor(min(n_workers, len(rows)), spawn) as pool:
        shared = [name for name in names if name in rows and name not in single] if rank == 0 else []
        predictions = {name: pool.submit(predict, overrides[name], n) for name in shared}
        for name in names:  # during a single-GPU row the other ranks wait
            work = works[name] if rank == 0 or name not in single else dict
            if rank == 0:
                found[name] = {"error": "did not finish on all ranks"}
                args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            metrics = run_row(name, work, store, rank, n)
            if rank == 0 and metrics is not None:
                if name in predictions and (failure := predictions[name].exception()):
                    print(f"{name:15} has no prediction: {failure}", flush=True)
                elif name in predictions:
                    metrics |= predictions[name].result()
                if name in rows and (base := found.get(rows[name].base, {}).get("causal_tflops")):
                    metrics["kept"] = metrics["causal_tflops"] / base
                measured = {ranks: found[key] for key, ranks in sizes.items() if "error" not in found.get(key, SKIP)}
                if name in tp_rows and measured and {"kept", "messages"} <= metrics.keys():
                    metrics["links"] = links_of(metrics, measured)
                if name in rows:
                    metrics["over_torchtitan"] = None
                elif name in peers and "tokens_per_s" in (ours := found.get(peers[name], {})):
                    ours["over_torchtitan"] = ours["tokens_per_s"] / metrics["tokens_per_s"]
                found[name] = metrics
                args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                print(line_of(name, metrics, rows.get(name)), flush=True)
    if rank == 0:
        print(f"\n{header}")
        for name, metrics in found.items():
            print(line_of(name, metrics, rows.get(name)))
        print(f"failed: {', '.join(failures(found)) or 'none'}; {args.json}", flush=True)
        shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
