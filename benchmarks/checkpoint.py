"""Cost of background saves: python -m benchmarks.checkpoint [--saves 4] model=1b parallel=zero1

Prints per save the stall, the time until it is committed, GB/s, the slowdown of the steps during it, and the share of
training time at checkpoint.every=100. Ranks start as with train.py: parallel.nproc_per_node=2, or torchrun.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.timing import synchronize, where
from benchmarks.train_step import build, configure
from conf.schema import TrainConfig
from data.batches import Batch
from data.dataset import open_corpus
from launch.ranks import launch
from parallel.engine import Engine
from parallel.mesh import Mesh, distributed
from training.config import Dtype
from training.resume import RunCheckpoints
from training.setup import build_train_batches
from training.state import TrainState

DEFAULTS = (
    "data.workers=0",
    "data.seq_len=2048",
    "data.micro_batch_size=8",
    "global_batch_tokens=65536",
    "checkpoint.every=100",
)
STEPS_WITHOUT_SAVE = 10
TOLERANCE = {Dtype.fp32: 1e-5}  # of the next loss in another layout, relative: products are summed in another order
TOLERANCE_16_BIT = 2e-3
BatchesOf = Callable[[TrainConfig, int], list[Batch]]


def work(config: TrainConfig, folder: Path, saves: int) -> None:
    """Time steps without a save, then saves and the steps during them."""
    with distributed(config.parallel) as mesh:
        engine, state = build(config, mesh), TrainState(device=mesh.device)
        corpus = open_corpus(config.data, vocab_size=config.model.vocab_size)
        batches = next(build_train_batches(config, mesh, corpus, state))
        run = RunCheckpoints(config, folder, corpus, engine, state)

        start = time.perf_counter()
        if run.background:
            run.snapshot.allocate()
        allocated_s = time.perf_counter() - start

        def step() -> float:
            synchronize(mesh.device)
            start = time.perf_counter()
            engine.train_step(batches)
            synchronize(mesh.device)
            state.step += 1
            return time.perf_counter() - start

        [step() for _ in range(3)]
        base_s = statistics.median(step() for _ in range(STEPS_WITHOUT_SAVE))
        if mesh.rank == 0:
            print(f"{where(mesh.device)}; {mesh.world_size} ranks, {config.model.name}, {base_s:.3f} s per step")
            print(f"host memory was allocated in {allocated_s:.1f} s; in training this happens before the first step")
            print("save   stall s   save s    GB/s   steps during it   slowdown, s   share at every=100")
        for number in range(1, saves + 1):
            step()
            run.save()
            stall_s = run.metrics["perf/checkpoint_stall_s"]
            if mesh.rank == 0:
                print(f"{number:4d} {stall_s:9.3f}", end="", flush=True)
            during = []
            while run.saving is not None:
                during.append(step())
                run.note_saved()
            times = run.take_metrics()
            slowdown_s = sum(during) - base_s * len(during)
            rate = times["perf/checkpoint_bytes_per_s"] / 1e9
            share = (stall_s + slowdown_s) / (100 * base_s + stall_s + slowdown_s)
            if mesh.rank == 0:
                print(
                    f" {times['perf/checkpoint_s']:8.1f} {rate:7.2f} {len(during):17d} {slowdown_s:13.3f}"
                    f" {share:20.2%}",
                    flush=True,
                )


def save_and_load(before: TrainConfig, after: TrainConfig, batches_of: BatchesOf, folder: Path) -> dict[str, Any]:
    """Save a run in the background, load it in another layout, and run the next step in both.

    `batches_of` returns a rank's micro-batches per step, given the number of data-parallel ranks. Return seconds,
    bytes/s, the losses, and as `equal` whether both next losses are the same but for rounding.
    """
    found = _save(before, batches_of, folder) | _load(after, batches_of, folder)
    found["load_bytes_per_s"] = found["bytes_per_s"] * found["s"] / found["load_s"]
    return found | {"equal": is_resumed(found, TOLERANCE.get(after.precision.compute, TOLERANCE_16_BIT))}


def _save(config: TrainConfig, batches_of: BatchesOf, folder: Path) -> dict[str, Any]:
    with distributed(config.parallel) as mesh, _run(config, mesh, folder) as (run, engine):
        batches = batches_of(config, mesh.dp_size)
        run.snapshot.allocate()  # as training does before its first step
        first_loss = float(engine.train_step(batches).loss)
        run.state.step = 1
        run.save()
        loss = float(engine.train_step(batches).loss)
        run.note_saved(wait=True)
        metrics = {key.removeprefix("perf/checkpoint_"): value for key, value in run.take_metrics().items()}
        return {"first_loss": first_loss, "loss": loss, **metrics}


def _load(config: TrainConfig, batches_of: BatchesOf, folder: Path) -> dict[str, Any]:
    with distributed(config.parallel) as mesh, _run(config, mesh, folder) as (run, engine):
        begin = time.perf_counter()
        run.checkpoints.newest(run.restore)
        synchronize(mesh.device)
        load_s = mesh.all_reduce_max(int(1e3 * (time.perf_counter() - begin))) / 1e3
        return {"load_s": load_s, "resumed_loss": float(engine.train_step(batches_of(config, mesh.dp_size)).loss)}


@contextmanager
def _run(config: TrainConfig, mesh: Mesh, folder: Path) -> Iterator[tuple[RunCheckpoints, Engine]]:
    corpus, engine = open_corpus(config.data, vocab_size=config.model.vocab_size), build(config, mesh)
    with RunCheckpoints(config, folder, corpus, engine, TrainState(device=mesh.device)) as run:
        yield run, engine


def is_resumed(losses: dict[str, float], tolerance: float) -> bool:
    """Return whether the resumed loss is the next one, and not the first one, as if nothing had been loaded."""
    off = abs(losses["resumed_loss"] - losses["loss"])
    return off <= tolerance * losses["loss"] and off < abs(losses["first_loss"] - losses["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="folder for checkpoints, which are removed (default: temporary)")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    config = configure((*DEFAULTS, *arguments.overrides))
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="checkpoints-"))
    try:
        launch(work, config, folder, arguments.saves, config=config.parallel)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
