"""Train four steps on one layout after another in eight processes, and the same steps in one process."""

import faulthandler
import pickle
import traceback
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.batches import Batch
from model.config import Attention, Parametrization
from model.layers import SwiGLU
from model.transformer import Block, Transformer
from parallel.axes import resolve_axes
from parallel.config import Compile, ParallelConfig
from parallel.engine import Engine, LossScaler
from parallel.mesh import Mesh, leave, open_mesh
from parallel.parallelize import parallelize
from tests.models import small_model
from tests.parallel.file_buffer import shared_files
from tests.parallel.packed import micro_batch
from training.config import LossConfig, OptimizerConfig, PrecisionConfig, Reduction
from training.optim.optimizer import Optimizer

MODELS = {
    "plain": small_model(n_layers=4, n_kv_heads=4, d_ff=64),
    "biased": small_model(n_layers=4, n_heads=8, n_kv_heads=4, attention_bias=True, embed_grad_scale=0.5),
    "wide": small_model(d_model=256, d_ff=512, attention_bias=True),  # heads as CUDA's kernels want them
    "tied": small_model(n_layers=4, tie_embeddings=True),
    "completep": small_model(n_layers=4, parametrization=Parametrization.completep, base_width=16, base_depth=2),
}
N_STEPS, N_MICRO_BATCHES = 4, 8


@dataclass(frozen=True)
class Case:
    """A layout and what to run on it."""

    world_size: int
    model: str = "plain"
    reduction: Reduction = Reduction.global_token
    n_micro_batches: int = N_MICRO_BATCHES  # per step, over all ranks
    dtype: torch.dtype = torch.float32
    attention: Attention = Attention.auto
    layout: dict[str, Any] = field(default_factory=dict)
    bad_rank: int | None = None  # whose gradient is made infinite in step 2
    fp8: str = "none"
    regularized: bool = False  # an auxiliary loss in every other layer
    optimizer: str = "adamw"
    normuon: bool = False
    shares_memory: bool = False  # as GPUs of one node do
    in_graphs: bool = False  # with the fixed memory of CUDA graphs, without recording them


RankFunction = Callable[[Case, Mesh, ParallelConfig], Any]


class RegularizedMLP(SwiGLU):
    """An MLP with an auxiliary loss on its input, large enough to change the training."""

    def forward(self, x_BTD: Tensor) -> Any:
        return super().forward(x_BTD), {"squares": 0.1 * x_BTD.float().square().mean()}


@dataclass
class Outcome:
    losses: list[float]
    norms: list[float]
    totals: list[list[float]]
    valid: list[float]
    finite: list[bool]
    weights: dict[str, Tensor]
    aux: list[dict[str, float]]
    bad_layer: str | None = None


def steps_of(n: int = N_MICRO_BATCHES) -> list[list[Batch]]:
    """Return steps of `n` micro-batches of many lengths, one of which has no target."""
    lengths = [[9, 7], [16], [4, 4, 8], [1, 15], [5, 11], [8, 8], [3, 3, 10], [16]]
    return [
        [
            micro_batch(lengths[(i + s) % 8], 100 * s + i, ignored=16 if i == s % n else i, source=i % 2)
            for i in range(n)
        ]
        for s in range(N_STEPS)
    ]


ALIVE: weakref.WeakSet[Any] = weakref.WeakSet()  # engines, and what gathers their parameters


def build(case: Case, mesh: Mesh, config: ParallelConfig) -> Engine:
    # A rounding error d of a gradient near 0 moves a weight by up to lr * d / eps: with the usual eps of 1e-8 that is a
    # whole update where d decides the sign.
    settings: Any = {"normuon": case.normuon, "options": {"momentum": 0.8}}
    optimizer = OptimizerConfig(name=case.optimizer, lr=3e-3, max_grad_norm=0.3, eps=1e-4, **settings)
    with torch.device("meta"):
        model = Transformer(replace(MODELS[case.model], attention=case.attention))
    for number, block in enumerate(model.blocks.values()):
        if case.regularized and number % 2:
            assert isinstance(block, Block)
            block.mlp.__class__ = RegularizedMLP
    laid_out = parallelize(model, mesh, config, case.dtype, fp8=case.fp8)
    laid_out.init_weights(3)
    built = Optimizer(model, optimizer, laid_out.params)
    built.set_schedule([(3e-3, 0.95)] * (N_STEPS + 1))
    loss = LossConfig(chunk_tokens=5, reduction=case.reduction)
    scaler, counts_3 = LossScaler(PrecisionConfig()), torch.zeros(3, dtype=torch.int64, device=mesh.device)
    sources = {"n_sources": 2, "bytes_per_token": torch.arange(64)}
    engine = Engine(laid_out, built, scaler, counts_3, loss=loss, max_grad_norm=optimizer.max_grad_norm, **sources)
    if case.in_graphs:
        engine.graphs = engine.graphs_on(None)
    ALIVE.update(part for part in (engine, engine.zero) if part is not None)
    return engine


def check_gathered_early(engine: Engine) -> None:
    """Assert that what the last update has gathered are the updated weights of all ranks."""
    if engine.zero is None or (unit := engine.zero.early_unit) is None:
        return
    engine.zero.stream.join()
    early = unit.full.clone()
    if engine.mesh.device.type == "cuda":
        torch.cuda.synchronize()
    engine.mesh.all_reduce_max(0)  # all ranks have updated their shards
    engine.zero._gather(unit)
    engine.zero.stream.join()
    unit.ready = None
    assert torch.equal(early, unit.full)


def outcome(case: Case, mesh: Mesh, config: ParallelConfig) -> Outcome:
    """Train, evaluate the last step's micro-batches, and gather the weights."""
    engine, steps, done = build(case, mesh, config), steps_of(case.n_micro_batches), []
    mine = [step[mesh.dp_rank :: mesh.dp_size] for step in steps]
    bad_layer = None
    for number, batches in enumerate(mine):
        check_gathered_early(engine)
        if number == 1:  # what the last update has left gathered is there for the next step too
            engine.evaluate(batches)
        if case.bad_rank is None or number != 2:
            done.append(engine.train_step(batches))
            continue
        handles: list[Any] = []
        if mesh.rank == case.bad_rank:
            module = engine.model.get_submodule("blocks.1.mlp.w_up")
            handles.append(module.register_forward_hook(lambda _m, _i, out: out.mul(float("inf"))))
        done.append(engine.train_step(batches))
        bad_layer = engine.find_nonfinite_module(batches)
        for handle in handles:
            handle.remove()
    valid = engine.evaluate(mine[-1])
    weights = {name: whole(param.laid_out(param.shard.detach())) for name, param in engine.params.items()}
    weights = {name: weight for part in mesh.gather(weights) for name, weight in part.items()}
    if MODELS[case.model].tie_embeddings and "head.weight" in weights:
        assert torch.equal(weights.pop("head.weight"), weights["embed.weight"]), "the tied copies differ"
    return Outcome(
        losses=[float(d.loss) for d in done],
        norms=[float(d.grad_norm) for d in done],
        totals=[d.totals_S4.flatten().tolist() for d in done],
        valid=valid.flatten().tolist(),
        finite=[bool(d.finite) for d in done],
        weights=weights,
        aux=[{name: float(value) for name, value in d.aux.items()} for d in done],
        bad_layer=bad_layer,
    )


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu().clone()


def alone(case: Case) -> Outcome:
    """Train the same steps in one process."""
    return outcome(case, Mesh(device=torch.device("cpu")), ParallelConfig())


def rank_main(rank: int, folder: Path, cases: dict[str, Case], device_type: str, function: RankFunction) -> None:
    """Run every case that has this rank; write the result, or the traceback, into `folder`."""
    torch.set_num_threads(1)
    device = torch.device("cpu") if device_type == "cpu" else torch.device(device_type, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The large ones first, so that no rank waits for one that has other cases to run.
    for name, case in sorted(cases.items(), key=lambda item: -item[1].world_size):
        if rank >= case.world_size:
            continue
        # A case that hangs ends with a stack; later than a compiler takes, or gloo to end a collective.
        slow = device.type == "cpu" or case.layout.get("compile") is not Compile.none
        with (folder / f"{name}.stack.{rank}").open("w") as stack:
            faulthandler.dump_traceback_later(180 if slow else 60, exit=True, file=stack)
            try:
                result: Any = _on_layout(rank, folder / f"{name}.store", case, device, function)
            except Exception:
                result = traceback.format_exc()
            faulthandler.cancel_dump_traceback_later()
        if rank == 0 or isinstance(result, str):
            (folder / f"{name}.{rank}").write_bytes(pickle.dumps(result))


def _on_layout(rank: int, store: Path, case: Case, device: torch.device, function: RankFunction) -> Any:
    on_cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_cuda else "gloo", store=dist.FileStore(str(store), case.world_size),  # type: ignore[attr-defined]
        rank=rank, world_size=case.world_size,
        timeout=timedelta(seconds=240 if on_cuda else 60),  # on CUDA, for a compiler too
    )  # fmt: skip
    try:
        config = ParallelConfig(**case.layout)
        assert not list(config.problems())
        axes = resolve_axes(config, case.world_size)
        mesh = open_mesh(axes, zero_stage=config.zero_stage, device=device)
        with shared_files(store.with_suffix(".files")) if case.shares_memory else nullcontext():
            found = function(case, mesh, config)
    finally:
        leave()
    assert not len(ALIVE), f"{list(ALIVE)} outlived the mesh, and with them the memory that ranks share"
    return found


def run(
    folder: Path, cases: dict[str, Case], n_ranks: int = 8, device_type: str = "cpu", function: RankFunction = outcome
) -> dict[str, Any]:
    """Run cases in one group of processes, which import torch once; returns rank 0's results, or tracebacks."""
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ranks: Sequence[Any] = [
        context.Process(target=rank_main, args=(r, folder, cases, device_type, function)) for r in range(n_ranks)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    found: dict[str, Any] = {}
    for name in cases:
        results = [pickle.loads(path.read_bytes()) for path in sorted(folder.glob(f"{name}.[0-7]"))]
        stacks = [f"{path.name}\n{path.read_text()}" for path in sorted(folder.glob(f"{name}.stack.*"))]
        silent = "\n".join((f"the ranks ended, with exit codes {[process.exitcode for process in ranks]}", *stacks))
        found[name] = next((text for text in results if isinstance(text, str)), results[0] if results else silent)
    return found
