"""One of the ranks of `test_sharded_checkpoint.py`: what they go through, one scenario after the other."""

import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from conf.schema import TrainConfig
from parallel.axes import Axes
from parallel.engine import LossScaler
from parallel.mesh import Mesh
from parallel.shards import ParamShard, local
from training import checkpoint as module
from training.agreement import check_same_run, check_tensors
from training.checkpoint import Checkpoints
from training.config import (
    CheckpointConfig,
    CheckpointError,
    OnSaveError,
    OptimizerConfig,
    PrecisionConfig,
    TrainingError,
)
from training.optim.optimizer import Optimizer
from training.ranks import Ranks
from training.resume import RunCheckpoints
from training.state import TrainState

SIZE = 4
WHOLE = {
    "model.a": torch.arange(40, dtype=torch.float32).view(10, 4),
    "model.b": torch.arange(5, dtype=torch.float32),  # does not divide
    "model.c": torch.arange(12, dtype=torch.bfloat16).view(3, 4),  # fewer rows than ranks
    "optimizer.a.exp_avg": torch.arange(40, dtype=torch.float32).view(10, 4) + 100,
}
# Placements on a mesh (rows, columns) of ranks
PLACES = {
    "flat": ((1, 4), (Replicate(), Shard(0))),
    "hybrid": ((2, 2), (Replicate(), Shard(0))),
    "both": ((2, 2), (Shard(0), Shard(-1))),
    "whole": ((2, 2), (Replicate(), Replicate())),
}


def place(whole: Tensor, mesh: DeviceMesh, placements: tuple) -> DTensor:
    """Return a rank's part of a tensor, without a word to the others."""
    placements = tuple(Shard(whole.ndim - 1) if p == Shard(-1) else p for p in placements)
    shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    part = tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))
    local = whole[part].clone()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def laid_out(name: str, fill: float | None = None) -> dict[str, Tensor]:
    """Return this rank's tensors in a layout; `stages` is a pipeline of two, each with half of the names."""
    source = {n: t if fill is None else torch.full_like(t, fill) for n, t in WHOLE.items()}
    if name == "plain":
        return {n: t.clone() for n, t in source.items()}
    if name == "stages":
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
        stage = grid.get_local_rank("pp")
        held = {n: t for i, (n, t) in enumerate(source.items()) if i % 2 == stage}
        return {n: place(t, grid["dp"], (Shard(0),)) for n, t in held.items()}
    shape, placements = PLACES[name]
    mesh = init_device_mesh("cpu", shape)
    return {n: place(t, mesh, placements) for n, t in source.items()}


def check(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(whole, WHOLE[name]), name


def pairs(folder: Path, rank: int) -> None:
    """Save in each layout and load in each other."""
    layouts = ["plain", "stages", *PLACES]
    for step, saved in enumerate(layouts, 1):
        checkpoints = Checkpoints(folder / saved, CheckpointConfig(keep=1), dist.group.WORLD)
        checkpoints.save(step, laid_out(saved), {"from": saved})
        newest = checkpoints.newest()
        assert newest is not None and newest.state == {"step": step, "from": saved}
        for loaded in layouts:
            tensors = laid_out(loaded, fill=-1.0)
            newest.load(tensors, exact=True)
            check(tensors)


def checkpoints_of(folder: Path, optimizer: Optimizer, **settings: Any) -> RunCheckpoints:
    """Return the checkpoints of a run that has made one step."""
    config = TrainConfig(checkpoint=CheckpointConfig(**settings))
    mesh = Mesh(torch.device("cpu"), Axes(dp_replicate=SIZE), dist.get_rank(), host=dist.group.WORLD)
    corpus: Any = SimpleNamespace(add_bos=True, add_eos=True, fingerprints=[], sources=[])
    engine: Any = SimpleNamespace(optimizer=optimizer, mesh=mesh, scaler=LossScaler(PrecisionConfig()))
    return RunCheckpoints(config, folder, corpus, engine, TrainState(step=1))


def rng(folder: Path, rank: int) -> None:
    """Save a random state per rank and take it back, here and with another number of ranks."""
    torch.manual_seed(5)
    run = checkpoints_of(folder / "rng", Optimizer(torch.nn.Linear(2, 2), OptimizerConfig()))
    torch.manual_seed(rank)
    run.save()
    expected = torch.rand(3)
    newest = run.checkpoints.newest()
    assert newest is not None
    torch.manual_seed(99)
    run.restore(newest)
    assert torch.equal(torch.rand(3), expected)
    run.rng_name = f"rng.cpu.{rank + 10}"
    run.restore(newest)
    first = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(first, torch.rand(3)), "a rank that was not there takes the first one's"


def faults(folder: Path, rank: int) -> None:
    """Break one rank's part in every way, and go on with what was good before."""
    checkpoints = Checkpoints(folder / "faults", CheckpointConfig(keep=0), dist.group.WORLD)
    for step in (1, 2, 3):
        checkpoints.save(step, laid_out("flat"), {"step_saved": step})
    shard = checkpoints.folder / "step-00000003" / "__1_0.distcp"
    if rank == 0:
        raw = bytearray(shard.read_bytes())
        raw[len(raw) // 2] ^= 1
        shard.write_bytes(raw)
        os.truncate(checkpoints.folder / "step-00000002" / "__1_0.distcp", 100)
    dist.barrier()
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 1, newest
    newest.load(laid_out("hybrid"), exact=True)
    # A disk that is full for rank 1 alone
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    big: dict[str, Tensor] = {"model.a": place(torch.zeros(1 << 20), init_device_mesh("cpu", (4,)), (Shard(0),))}
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, limits[1]))
    message = refusal(lambda: checkpoints.save(4, big, {}))
    words = ("step 4 was not saved", "rank 1", "earlier checkpoints are untouched")
    assert all(word in message for word in words), message
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    assert [p.name for p in checkpoints.folder.glob("*4*")] == [] and not list(checkpoints.folder.glob(".tmp*"))
    checkpoints.save(4, big, {})
    dist.barrier()
    # What rank 0 alone cannot do
    real = module.os.rename
    module.os.rename = lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error"))
    message = refusal(lambda: checkpoints.save(5, big, {}))
    module.os.rename = real
    assert "Input/output error" in message, message


def agreement(folder: Path, rank: int) -> None:
    """Compare replicas and what ranks were started with; one of four is made to differ."""
    ranks = Ranks(dist.group.WORLD)
    for layout in ("plain", "stages", *PLACES):
        check_tensors(laid_out(layout), ranks)

    def broken(layout: str, name: str, change: Callable[[Tensor], object]) -> str:
        tensors = laid_out(layout)
        if rank == 3:
            change(local(tensors[name]).view(-1)[-1:])
        return refusal(lambda: check_tensors(tensors, ranks))

    message = broken("hybrid", "optimizer.a.exp_avg", lambda number: number.neg_())
    assert "ranks 1 and 3" in message and "optimizer.a.exp_avg" in message, message
    message = broken("whole", "model.c", lambda number: number.view(torch.int16).bitwise_xor_(1))
    assert "ranks 0 and 3" in message and "model.c" in message, message
    message = broken("flat", "model.a", lambda number: number.fill_(float("nan")))
    assert "model.a on rank 3 is not finite" in message, message
    check_same_run({"configuration": {"lr": 1e-4}, "data": ["f"]}, ranks)
    message = refusal(lambda: check_same_run({"configuration": {"lr": 1e-4 * (1 + (rank == 2))}, "data": []}, ranks))
    assert "rank 2 has another configuration than rank 0" in message, message


def refusal(step: Callable[[], object]) -> str:
    try:
        step()
    except (CheckpointError, TrainingError) as error:
        return str(error)
    raise AssertionError("nothing was refused")


def killed(folder: Path, rank: int) -> None:
    """Rank 1 is killed while it hashes; the others must raise, not hang."""
    checkpoints = Checkpoints(folder / "killed", CheckpointConfig(keep=1), dist.group.WORLD)
    checkpoints.save(1, laid_out("flat"), {})
    if rank == 1:
        module._describe = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    message = refusal(lambda: checkpoints.save(2, laid_out("flat"), {}))
    assert "step 2 was not saved" in message, message


def no_space(*_: object) -> None:
    """Run by the process that writes."""
    raise OSError(28, "No space left on device")


def background(folder: Path, rank: int) -> None:
    """Save shards while they change, then have rank 1 fail, and save again."""
    mesh = init_device_mesh("cpu", (SIZE,))
    half = place(torch.full((6, 5), 0.5, dtype=torch.bfloat16), mesh, (Shard(0),)).to_local()
    params = {"weight": ParamShard(half, torch.Size((6, 5)), mesh, (Shard(0),))}
    optimizer = Optimizer(torch.nn.Linear(5, 6), OptimizerConfig(), params=params)
    run = checkpoints_of(folder / "background", optimizer, keep=0, asynchronous=True)
    checkpoints = run.checkpoints
    real, changed = module._write, threading.Event()

    def hold(*args: Any) -> int:
        changed.wait(60)
        return real(*args)

    module._write = hold
    run.save()
    half.fill_(0.25)
    run.note_saved()
    assert run.saving is not None and run.saved_step == 0, "the other rank's may still be under way"
    changed.set()
    run.note_saved(wait=True)
    assert run.saved_step == 1 and run.metrics["perf/checkpoint_s"] > 0
    saved = checkpoints.newest()
    assert saved is not None and bool((saved.read("model.")["weight"] == 0.5).all())

    assert run.snapshot.process is not None
    run.state.step, call = 2, run.snapshot.process.call

    def fails_to_write(function: Any, *args: Any) -> Any:
        return call(no_space if rank == 1 and function is module._write_items else function, *args)

    run.snapshot.process.call = fails_to_write
    run.config.checkpoint.on_save_error = OnSaveError.stop
    run.save()
    polls, message = 0, ""
    while not message and polls < 1000:
        polls += 1
        time.sleep(0.01)
        try:
            run.note_saved()
        except CheckpointError as error:
            message = str(error)
    assert "rank 1: [Errno 28]" in message, message
    assert len(set(run.ranks.all_gather(lambda: polls))) == 1, "both at the same step"
    run.note_saved(wait=True)  # not twice
    run.snapshot.process.call = call
    run.save(last=True)
    assert run.saved_step == 2 and sorted(path.name for path in checkpoints.folder.glob("step-*")) == [
        "step-00000001", "step-00000002",
    ]  # fmt: skip


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING, filename=folder / f"{rank}.log", format="%(message)s")
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=SIZE, timeout=timedelta(seconds=60))
    for scenario in (pairs, rng, faults, agreement, background, killed):
        scenario(folder, rank)
    os._exit(0)  # a group that has lost a rank cannot be taken apart
