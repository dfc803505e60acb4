"""Eight processes that run ten steps on one layout after another, and what one process makes of the same steps."""

import faulthandler
import pickle
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import Attention, Init, ModelConfig
from model.transformer import Transformer
from parallel.axes import resolve_axes
from parallel.config import Compile, ParallelConfig
from parallel.counters import StepCounters
from parallel.engine import Engine
from parallel.loss_scaler import LossScaler
from parallel.mesh import Mesh, leave, open_mesh
from parallel.parallelize import parallelize, write_shard
from tests.parallel.packed import Packed, micro_batch
from training.config import LossConfig, OptimizerConfig, PrecisionConfig, Reduction
from training.optim.optimizer import build_optimizer

MODELS = {
    "plain": ModelConfig(
        name="plain", vocab_size=64, d_model=32, n_layers=4, n_heads=4, n_kv_heads=4, d_ff=64, max_seq_len=64,
        init=Init.llama,
    ),
    "biased": ModelConfig(  # grouped queries too
        name="biased", vocab_size=64, d_model=32, n_layers=4, n_heads=8, n_kv_heads=4, d_ff=48, max_seq_len=64,
        init=Init.llama, attention_bias=True, embed_grad_scale=0.5,
    ),
    "wide": ModelConfig(  # heads as CUDA's kernels want them
        name="wide", vocab_size=64, d_model=256, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=512, max_seq_len=64,
        init=Init.llama, attention_bias=True,
    ),
    "tied": ModelConfig(
        name="tied", vocab_size=64, d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=64,
        init=Init.llama, tie_embeddings=True,
    ),
}  # fmt: skip
N_STEPS, N_MICRO_BATCHES = 10, 8


@dataclass(frozen=True)
class Case:
    """A layout, and what to run on it."""

    world_size: int
    model: str = "plain"
    reduction: Reduction = Reduction.global_token
    n_micro_batches: int = N_MICRO_BATCHES  # of a step, before data parallelism divides them
    dtype: torch.dtype = torch.float32
    attention: Attention = Attention.auto
    layout: dict[str, Any] = field(default_factory=dict)
    bad_rank: int | None = None  # whose gradient is made infinite in step 2
    fp8: str = "none"


Of = Callable[[Case, Mesh, ParallelConfig], Any]  # what a rank makes of a case


@dataclass
class Outcome:
    losses: list[float]
    norms: list[float]
    totals: list[list[float]]
    valid: list[float]
    finite: list[bool]
    weights: dict[str, Tensor]
    bad_layer: str | None = None


def steps_of(n: int = N_MICRO_BATCHES) -> list[list[Packed]]:
    """Packs of many lengths in steps of `n` micro-batches, one of which has no target."""
    lengths = [[9, 7], [16], [4, 4, 8], [1, 15], [5, 11], [8, 8], [3, 3, 10], [16]]
    return [
        [
            micro_batch(lengths[(i + s) % 8], 100 * s + i, ignored=16 if i == s % n else i, source=i % 2)
            for i in range(n)
        ]
        for s in range(N_STEPS)
    ]


def build(case: Case, mesh: Mesh, config: ParallelConfig) -> Engine:
    # eps: Adam divides the rounding of a gradient that is nearly 0 by itself, and would make a difference of it
    optimizer = OptimizerConfig(lr=3e-3, max_grad_norm=0.3, eps=1e-5)
    with torch.device("meta"):
        model = Transformer(replace(MODELS[case.model], attention=case.attention))
    stages = parallelize(model, mesh, config, case.dtype, fp8=case.fp8)
    model.init_weights(3, write_shard)
    adamw = build_optimizer(model, optimizer, tied_params=model.tied_params)
    adamw.set_schedule([(3e-3, 0.95)] * (N_STEPS + 1))
    return Engine(
        model,
        adamw,
        mesh,
        loss=LossConfig(chunk_tokens=5, reduction=case.reduction),
        counters=StepCounters(mesh.device),
        scaler=LossScaler(PrecisionConfig()),
        max_grad_norm=optimizer.max_grad_norm,
        n_sources=2,
        parallel=config,
        stages=stages,
        bytes_per_token=torch.arange(64),
    )


def outcome(case: Case, mesh: Mesh, config: ParallelConfig) -> Outcome:
    """Train, score the last step's micro-batches, and put the weights together."""
    engine, steps, done = build(case, mesh, config), steps_of(case.n_micro_batches), []
    mine = [step[mesh.dp_rank :: mesh.dp_size] for step in steps]
    bad_layer = None
    for number, batches in enumerate(mine):
        broken = case.bad_rank is not None and number == 2
        handles = _break(engine, mesh, case.bad_rank) if broken else []
        done.append(engine.train_step(batches))
        if broken:
            bad_layer = engine.find_nonfinite_module(batches)
        for handle in handles:
            handle.remove()
    valid = engine.evaluate(mine[-1])
    weights = {name: whole(param.detach()) for name, param in engine.params.items()}
    weights = {name: weight for part in mesh.gather(weights) for name, weight in part.items()}
    if MODELS[case.model].tie_embeddings and "head.weight" in weights:
        assert torch.equal(weights.pop("head.weight"), weights["embed.weight"]), "the copies went apart"
    return Outcome(
        losses=[float(d.loss) for d in done],
        norms=[float(d.grad_norm) for d in done],
        totals=[d.totals_S4.flatten().tolist() for d in done],
        valid=valid.flatten().tolist(),
        finite=[bool(d.finite) for d in done],
        weights=weights,
        bad_layer=bad_layer,
    )


def _break(engine: Engine, mesh: Mesh, rank: int | None) -> list[Any]:
    if mesh.rank != rank:
        return []
    block = engine.model.get_submodule("blocks.1.mlp.w_up")
    return [block.register_forward_hook(lambda _m, _i, out: out.mul(float("inf")))]


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu().clone()


def alone(case: Case) -> Outcome:
    """The same steps on one process."""
    return outcome(case, Mesh(device=torch.device("cpu")), ParallelConfig())


def rank_main(rank: int, folder: Path, cases: dict[str, Case], device_type: str, of: Of) -> None:
    """Run every case that has a place for this rank; leave what came out, or the traceback, in `folder`."""
    torch.set_num_threads(1)
    device = torch.device("cpu") if device_type == "cpu" else torch.device(device_type, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The large ones first: nobody waits for a rank that has other cases to do.
    for name, case in sorted(cases.items(), key=lambda item: -item[1].world_size):
        if rank >= case.world_size:
            continue
        # A case that hangs says where and ends: before that, compilers may take their time, and gloo end a collective.
        slow = device.type == "cpu" or case.layout.get("compile") is not Compile.none
        with (folder / f"{name}.stack.{rank}").open("w") as stack:
            faulthandler.dump_traceback_later(180 if slow else 60, exit=True, file=stack)
            try:
                result: Any = _on_layout(rank, folder / f"{name}.store", case, device, of)
            except Exception:
                result = traceback.format_exc()
            faulthandler.cancel_dump_traceback_later()
        if rank == 0 or isinstance(result, str):
            (folder / f"{name}.{rank}").write_bytes(pickle.dumps(result))


def _on_layout(rank: int, store: Path, case: Case, device: torch.device, of: Of) -> Any:
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
        return of(case, mesh, config)
    finally:
        leave()


def run(
    folder: Path, cases: dict[str, Case], n_ranks: int = 8, device_type: str = "cpu", of: Of = outcome
) -> dict[str, Any]:
    """Run cases in one group of processes, which import torch once for all; gives what `of` does, or a traceback."""
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ranks: Sequence[Any] = [
        context.Process(target=rank_main, args=(r, folder, cases, device_type, of)) for r in range(n_ranks)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    found: dict[str, Any] = {}
    for name in cases:
        told = [pickle.loads(path.read_bytes()) for path in sorted(folder.glob(f"{name}.[0-7]"))]
        stacks = [f"{path.name}\n{path.read_text()}" for path in sorted(folder.glob(f"{name}.stack.*"))]
        silent = "\n".join((f"the ranks ended, with exit codes {[process.exitcode for process in ranks]}", *stacks))
        found[name] = next((text for text in told if isinstance(text, str)), told[0] if told else silent)
    return found
