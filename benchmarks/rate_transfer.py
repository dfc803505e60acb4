"""Transfer of the best learning rates across widths: the `transfer` command of benchmarks.optimizers.

For each optimizer, parametrization and width, tries learning rates in factors of 2 around a start, more at an end where
the loss still decreases, and those a factor of sqrt(2) from the best. The best rate is the minimum of a parabola in
log(rate) through the lowest losses. Runs a process per optimizer and width, all on the same GPU.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.optimizers import OPTIMIZERS, Results, Run, batch_settings, open_mesh, settings, train
from conf.ladder import d_ff

PARAMETRIZATIONS = ("mup", "standard")
STARTS = {"adamw": 4e-3, "muon": 1.6e-2}  # start of the search
MAX_EXTRA_RATES = 4  # that a search can add to the first five
HEAD_DIM = 64


def rates_to_try(losses: dict[float, float], start: float) -> Iterator[float]:
    """Yield rates; the caller adds the loss of each to `losses` before it takes the next one."""
    for power in (0, -1, 1, -2, 2):
        yield start * 2.0**power
    for _ in range(MAX_EXTRA_RATES):
        tried = sorted(losses)
        best = tried.index(lowest(losses))
        if best < 2:
            yield tried[0] / 2
        elif best > len(tried) - 3:
            yield tried[-1] * 2
    best_rate = lowest(losses)
    yield from (best_rate / math.sqrt(2), best_rate * math.sqrt(2))


def lowest(losses: dict[float, float]) -> float:
    return min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)


def best_by_parabola(losses: dict[float, float]) -> float:
    """Return the minimum of a parabola in log(rate) through the five rates nearest to that of the lowest loss."""
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        return math.nan
    best = lowest(finite)
    near = sorted(finite, key=lambda rate: abs(math.log(rate / best)))[:5]
    if len(near) < 3:
        return best
    x = np.log2(np.array(near) / best)
    a, b, _ = np.polyfit(x, [finite[rate] for rate in near], 2)
    return best * 2 ** float(np.clip(-b / (2 * a), x.min(), x.max())) if a > 0 else best


def run_worker(arguments: argparse.Namespace) -> None:
    """Run one optimizer and width; print a JSON line per run."""
    optimizer, text, until = arguments.worker.split(":")
    mesh, width, end = open_mesh(), int(text), float(until)
    torch.set_num_threads(max(1, torch.get_num_threads() // 4))
    rows, existing = arguments.micro_rows, Results(arguments.out / "transfer.json", about_of(arguments)).runs
    on_gpu = ("parallel.cuda_graphs=true",) if mesh.device.type == "cuda" else ()
    heads = max(1, width // HEAD_DIM)
    longest = 0.0
    for kind in PARAMETRIZATIONS:
        losses: dict[float, float] = {}
        for rate in rates_to_try(losses, STARTS[optimizer]):
            key = {"optimizer": optimizer, "width": width, "way": kind, "rate": rate}
            if before := next((run for run in existing if all(run[k] == v for k, v in key.items())), None):
                losses[rate] = before["loss"]
                continue
            if time.time() + longest > end:
                return
            start = time.time()
            scale = ("optimizer.scale=spectral",) if optimizer == "muon" else ()
            config = settings(
                arguments.corpus, "model=tiny", f"model.d_model={width}", f"model.n_layers={arguments.layers}",
                f"model.n_heads={heads}", f"model.n_kv_heads={heads}", f"model.d_ff={d_ff(width)}",
                "model.attention_bias=false", f"model.parametrization={kind}",
                f"model.base_width={min(arguments.widths)}", f"model.base_depth={arguments.layers}",
                f"optimizer={optimizer}", f"optimizer.lr={rate!r}", f"steps={arguments.steps}",
                *batch_settings(arguments.batch_tokens, rows, arguments.seq_len), *scale,
                f"valid_tokens={arguments.valid_tokens}", *on_gpu, *arguments.overrides,
            )  # fmt: skip
            found = train(config, mesh, validations=1)
            losses[rate] = found["loss"]
            if len(losses) > 1:  # the first includes compilation
                longest = max(longest, time.time() - start)
            print(json.dumps(key | {"loss": found["loss"], "seconds": found["seconds"]}), flush=True)


def about_of(arguments: argparse.Namespace) -> dict[str, Any]:
    keys = ("layers", "steps", "batch_tokens", "seq_len", "widths", "valid_tokens", "overrides")
    return {key: getattr(arguments, key) for key in keys}


def transfer(arguments: argparse.Namespace) -> None:
    if arguments.worker:
        run_worker(arguments)
        return
    from benchmarks.optimizers import plot

    results = Results(arguments.out / "transfer.json", about_of(arguments), arguments.copy)
    if results.runs:
        results.save()
    began = time.time()
    end = began + 60 * arguments.minutes
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    waiting = deque((name, width) for width in sorted(arguments.widths, reverse=True) for name in OPTIMIZERS)
    running: list[tuple[subprocess.Popen[bytes], str]] = []
    logs = arguments.out / "workers"
    logs.mkdir(parents=True, exist_ok=True)
    n_read = dict[str, int]()
    while waiting or running:
        while waiting and len(running) < arguments.processes:
            name, width = waiting.popleft()
            worker = f"{name}:{width}"
            command = [sys.executable, "-m", "benchmarks.optimizers", *worker_arguments(arguments, f"{worker}:{end}")]
            files = [(logs / f"{name}_{width}.{kind}").open(mode="wb") for kind in ("jsonl", "log")]
            with files[0] as out, files[1] as log:
                running.append((subprocess.Popen(command, stdout=out, stderr=log, env=environment), worker))
        time.sleep(1)
        for process, worker in list(running):
            ended = process.poll() is not None
            path = logs / f"{worker.replace(':', '_')}.jsonl"
            lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
            for line in lines[n_read.get(worker, 0) :]:
                results.add(run := json.loads(line))
                print(f"{time.time() - began:4.0f} s  {run['optimizer']:6} {run['way']:8} width {run['width']:5} "
                      f"rate {run['rate']:<8.3g} loss {run['loss']:.4f} ({run['seconds']:.1f} s)",
                      flush=True)  # fmt: skip
            n_read[worker] = len(lines)
            if ended:
                running.remove((process, worker))
                if process.returncode:
                    tail = path.with_suffix(".log").read_text(encoding="utf-8")[-1500:]
                    print(f"{worker} failed with exit code {process.returncode}:\n{tail}", flush=True)
    report_transfer(results.runs)
    plot(arguments.out)


def worker_arguments(arguments: argparse.Namespace, worker: str) -> list[str]:
    """Return the arguments of a worker's process."""
    keys = ("out", "seq_len", "valid_tokens", "layers", "steps", "batch_tokens", "micro_rows")
    options = [text for key in keys for text in (f"--{key.replace('_', '-')}", str(getattr(arguments, key)))]
    lists = ["--widths", *map(str, arguments.widths), "--overrides", *arguments.overrides]
    return ["transfer", str(arguments.corpus), *options, "--worker", worker, *lists]


def curves_of(runs: Sequence[Run]) -> dict[tuple[str, str], dict[int, dict[float, float]]]:
    """Return losses by optimizer and parametrization, width, and rate."""
    found: dict[tuple[str, str], dict[int, dict[float, float]]] = {}
    for run in sorted(runs, key=lambda run: (run["optimizer"], run["way"], run["width"], run["rate"])):
        by_width = found.setdefault((run["optimizer"], run["way"]), {})
        by_width.setdefault(run["width"], {})[run["rate"]] = run["loss"]
    return found


def report_transfer(runs: Sequence[Run]) -> None:
    """Print losses over rates, with the best marked, and the spread of the best rates."""
    for (optimizer, kind), by_width in curves_of(runs).items():
        rates, bests = sorted({rate for losses in by_width.values() for rate in losses}), []
        print(f"\n{optimizer}, {kind}: validation loss\n  rate " + " ".join(f"{rate:8.2g}" for rate in rates))
        for width, losses in by_width.items():
            best, lowest_rate = best_by_parabola(losses), lowest(losses)
            bests.append(best)
            cells = (f"{losses[rate]:7.4f}{'*' if rate == lowest_rate else ' '}" if rate in losses else " " * 8
                     for rate in rates)  # fmt: skip
            edge = ", at the end of the tried rates" if lowest_rate in (min(losses), max(losses)) else ""
            print(f"{width:6} {' '.join(cells)}  best {best:.3g}{edge}")
        if len(bests) > 1:
            drift, widths = max(bests) / min(bests), sorted(by_width)
            print(f"  best rates of widths {widths[0]} to {widths[-1]} are within a factor of {drift:.2f}"
                  f"{f' (target {math.sqrt(2):.2f})' if kind == 'mup' else ''}; "
                  f"largest / smallest width {bests[-1] / bests[0]:.2f}")  # fmt: skip


def plot_transfer(runs: Sequence[Run], path: Path) -> None:
    from matplotlib.figure import Figure

    figure, curves = Figure(figsize=(11, 8), dpi=110, layout="constrained"), curves_of(runs)
    for row, optimizer in zip(figure.subplots(2, 2, sharex="row", sharey="row"), OPTIMIZERS, strict=True):
        for axis, kind in zip(row, reversed(PARAMETRIZATIONS), strict=True):
            axis.set_title(f"{optimizer}, {kind}")
            axis.set(xscale="log", xlabel="rate", ylabel="validation loss")
            for number, (width, losses) in enumerate(curves.get((optimizer, kind), {}).items()):
                axis.plot(list(losses), list(losses.values()), marker=".", color=f"C{number}", label=f"width {width}")
                best = best_by_parabola(losses)
                if math.isfinite(best):
                    axis.axvline(best, color=f"C{number}", linestyle=":")
            axis.legend()
        finite = [loss for kind in PARAMETRIZATIONS for losses in curves.get((optimizer, kind), {}).values()
                  for loss in losses.values() if math.isfinite(loss)]  # fmt: skip
        if finite:
            row[0].set_ylim(min(finite) - 0.05, min(finite) + 1.2)
    figure.savefig(path)
