"""Weights gathered in 8 bits train exactly like weights that are cast after they are gathered."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from data.batches import Batch
from dry_run.trace import ObserveOps, n_bytes
from model.config import Attention
from parallel import parallelize as apply
from parallel.config import ActivationCheckpointing, Compile, ParallelConfig
from parallel.engine import Engine
from parallel.mesh import Mesh
from parallel.tensor_parallel import local
from tests.parallel.layouts import Case, build, run, steps_of
from tests.parallel.packed import micro_batch


def case(world_size: int, **layout: Any) -> Case:
    return Case(world_size, "wide", dtype=torch.bfloat16, fp8="tensorwise", layout=layout)


CASES = {
    "zero1_2": case(2, dp_shard=2, zero_stage=1),
    "zero2_uneven_3": case(3, dp_shard=3, zero_stage=2),
    "zero3_recomputed_2": case(
        2, dp_shard=2, zero_stage=3, activation_checkpointing=ActivationCheckpointing.full
    ),
    "hybrid3_4": case(4, dp_replicate=2, dp_shard=2, zero_stage=3),
    "tp_zero3_4": case(4, dp_shard=2, tp=2, zero_stage=3),
    "cp_zero2_4": case(4, dp_shard=2, cp=2, zero_stage=2),
    "pp_zero3_4": case(4, pp=2, dp_shard=2, zero_stage=3),
    "zero3_compiled_2": case(2, dp_shard=2, zero_stage=3, compile=Compile.blocks),
    "ddp_2": case(2, dp_replicate=2),
}  # fmt: skip


@dataclass
class Found:
    figures: list[list[float]]  # evaluation, two steps, evaluation, a step
    weights: dict[str, Tensor]  # of rank 0
    resumed: list[list[float]]  # the last evaluation and step, from a checkpoint
    gathered: int  # bytes, in the first step
    graphs: list[int]  # compiled by the end of the first step, and of all


class Gathered:
    """Counts what FSDP gathers."""

    n_bytes = 0

    def observe(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func.namespace == "c10d" and "allgather" in func._overloadpacket.__name__:
            self.n_bytes += n_bytes(args[0])


def figures_of_step(engine: Engine, batches: list[Batch]) -> list[float]:
    result = engine.train_step(batches)
    return [float(result.loss), float(result.grad_norm)]


@contextmanager
def allowed(device: torch.device, *, before: bool) -> Iterator[None]:
    """Allow 8-bit products on a CPU, and cast weights before they are gathered or after."""
    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(mock.patch.object(apply, "check_fp8_device"))
            # Inductor drops roundings between operations that it fuses, and may fuse differently.
            eager = partial(apply.compile_blocks, backend="aot_eager")
            stack.enter_context(mock.patch.object(apply, "compile_blocks", eager))
        if not before:
            stack.enter_context(mock.patch.object(apply, "cast_before_gathering"))
        yield


def steps(case: Case, mesh: Mesh, config: ParallelConfig, *, before: bool) -> Found:
    """Evaluate, train, evaluate, and resume from what a checkpoint would hold."""
    n_batches = 8 - 8 % mesh.dp_size
    first, second, third = (step[:n_batches][mesh.dp_rank :: mesh.dp_size] for step in steps_of()[:3])
    valid = [*first, micro_batch([9, 5], 7)]  # the last needs padding
    with allowed(mesh.device, before=before):
        engine, other = (build(case, mesh, config) for _ in range(2))
    gathered = Gathered()
    figures = [engine.evaluate(valid).flatten().tolist()]
    # A compiler refuses to be observed.
    with nullcontext() if apply.compiles(config, mesh) else ObserveOps(gathered.observe):
        figures.append(figures_of_step(engine, first))
    graphs = [counters["stats"]["unique_graphs"]]
    figures.append(figures_of_step(engine, second))
    optimizers: Any = engine.optimizer, other.optimizer
    kept, loaded = (optimizer.state_tensors() for optimizer in optimizers)
    for name, tensor in loaded.items():
        local(tensor).copy_(local(kept[name]))
    optimizers[1].load_tensors(loaded)
    resumed = [other.evaluate(valid).flatten().tolist(), figures_of_step(other, third)]
    figures += [engine.evaluate(valid).flatten().tolist(), figures_of_step(engine, third)]
    weights = {name: local(param.detach()).cpu().clone() for name, param in engine.params.items()}
    graphs.append(counters["stats"]["unique_graphs"])
    return Found(figures, weights, resumed, gathered.n_bytes, graphs)


def both_ways(case: Case, mesh: Mesh, config: ParallelConfig) -> tuple[Found, Found]:
    return steps(case, mesh, config, before=True), steps(case, mesh, config, before=False)


def check(found: Any) -> None:
    assert not isinstance(found, str), found
    before, after = found
    assert before.figures == after.figures
    assert all(torch.equal(before.weights[name], weight) for name, weight in after.weights.items())
    assert before.resumed == before.figures[-2:]
    assert before.figures[0] != before.figures[-2], "the weights, and so their scales, did not change"
    assert before.graphs[0] == before.graphs[1]
    assert before.gathered <= 0.55 * after.gathered  # embedding, head, norms and biases are in bf16


@pytest.fixture(scope="module")
def on_cpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of the selected cases."""
    items: list[Any] = [item for item in request.session.items if "on_cpu" in getattr(item, "fixturenames", ())]
    cases = {item.callspec.params["name"]: CASES[item.callspec.params["name"]] for item in items}
    return run(
        tmp_path_factory.mktemp("ranks"), cases, max(case.world_size for case in cases.values()), function=both_ways
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_steps_are_equal(name: str, on_cpu: dict[str, Any]) -> None:
    check(on_cpu[name])


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_steps_are_equal_on_two_gpus_and_close_when_compiled(tmp_path: Path) -> None:
    cases = {
        f"{name}_{compile.value}": replace(
            CASES[name],
            attention=Attention.reference if compile is Compile.none else Attention.varlen,
            layout={**CASES[name].layout, "compile": compile},
        )
        for name in ("zero1_2", "zero3_recomputed_2")
        for compile in (Compile.none, Compile.blocks)
    }
    found = run(tmp_path, cases, 2, "cuda", function=both_ways)
    for name in ("zero1_2", "zero3_recomputed_2"):
        check(found[f"{name}_none"])
        assert not isinstance(found[f"{name}_blocks"], str), found[f"{name}_blocks"]
        before, after = found[f"{name}_blocks"]
        for figures, others in zip(before.figures, after.figures, strict=True):
            guesses = range(1, len(figures), 4) if len(figures) > 2 else ()  # correct ones, of each source's totals
            for place, (one, other) in enumerate(zip(figures, others, strict=True)):
                # Rounding may decide which of two close logits is the larger: allowed for two tokens.
                assert one == (pytest.approx(other, abs=2) if place in guesses else pytest.approx(other, rel=1e-2))
