"""What ranks send each other, in three processes: exact sums, uneven shards, one order of messages, one graph."""

from functools import partial
from itertools import chain
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from parallel import parallelize as apply
from parallel.config import ActivationCheckpointing, Compile, ParallelConfig
from parallel.mesh import Mesh
from tests.parallel.layouts import Case, build, run, steps_of, whole

uneven = partial(Case, 3, "biased", n_micro_batches=6, dtype=torch.bfloat16)  # 32, 48 and 64 rows; 3 ranks
SELECTIVE = {"activation_checkpointing": ActivationCheckpointing.selective}
CASES = {
    **{f"zero{stage}": uneven(layout={"dp_shard": 3, "zero_stage": stage}) for stage in (1, 2, 3)},
    "tp": Case(2, "biased", layout={"tp": 2, "compile": Compile.blocks}),
    "tp_no_sp": Case(2, "biased", layout={"tp": 2, "sequence_parallel": False, "compile": Compile.blocks}),
    "tp_selective": Case(2, "biased", layout={**SELECTIVE, "tp": 2, "compile": Compile.blocks}),
    "async_tp": Case(2, "biased", shares_memory=True, layout={"async_tp": True, "tp": 2, "compile": Compile.blocks}),
    "async_tp_selective": Case(
        2, shares_memory=True, layout={**SELECTIVE, "async_tp": True, "tp": 2, "compile": Compile.blocks}
    ),
}
UNUSED = "blocks.2.mlp.w_up.weight"  # by rank 1


def gradient(name: str, shape: torch.Size, micro_batch: int, rank: int) -> Tensor:
    """Return numbers whose sums over two micro-batches bf16 holds exactly, and over ranks only fp32."""
    if name == UNUSED and rank == 1:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(100 * micro_batch + 10 * rank + len(name))
    return torch.randint(-127, 128, shape, generator=generator) * 2.0 ** (4 * rank - 2)


def summed_gradients(case: Case, mesh: Mesh, config: ParallelConfig, max_exchange: int) -> dict[str, Tensor]:
    """Return the sums of two micro-batches' gradients, which arrive in another order on each rank."""
    model = build(case, mesh, config)
    zero: Any = model.zero
    named = list(model.model.named_parameters())
    with mock.patch("parallel.zero.MAX_EXCHANGE", max_exchange):
        for micro_batch in range(2):
            for unit in chain.from_iterable(zero.units):
                zero._wait_gathered(unit, None)
            zero.begin_backward(0, first=micro_batch == 0, last=micro_batch == 1)
            order = torch.randperm(len(named), generator=torch.Generator().manual_seed(mesh.rank)).tolist()
            terms = [
                (named[i][1] * gradient(named[i][0], named[i][1].shape, micro_batch, mesh.rank).bfloat16()).sum()
                for i in order
                if named[i][0] != UNUSED or mesh.rank != 1
            ]
            torch.stack(terms).sum().backward()
            zero.end_backward()
        zero.finish()
    params: dict[str, Any] = model.params
    assert all(param.grad.dtype == torch.float32 for param in params.values())
    return {name: whole(param.laid_out(param.grad)) for name, param in params.items()}


def check_sharded(case: Case, mesh: Mesh, config: ParallelConfig) -> None:
    exchanged, reduced = (summed_gradients(case, mesh, config, most) for most in (8, 1))
    for name, total in exchanged.items():
        parts = [gradient(name, total.shape, i, rank) for i in range(2) for rank in range(3)]
        assert torch.equal(total, torch.stack(parts).sum(0)), name
        assert torch.equal(reduced[name], total), name
    engine, batches = build(case, mesh, config), steps_of(case.n_micro_batches)[0][mesh.rank :: 3]
    zero: Any = engine.zero
    for run_it in (engine.evaluate, engine.train_step, engine.evaluate):
        run_it(batches)
        sizes = {unit.full.untyped_storage().nbytes() > 0 for unit in chain.from_iterable(zero.units)}
        assert sizes == {config.zero_stage < 3}


def check_compiled(case: Case, mesh: Mesh, config: ParallelConfig) -> None:
    """Train a step eagerly and compiled: of each block the parts before and after attention are one graph each."""
    losses, batches = [], steps_of()[0][:1]
    for compiles in (False, True):
        counters.clear()
        with (
            mock.patch.object(ParallelConfig, "compiles", lambda *_, found=compiles: found),
            mock.patch.object(apply, "compile_blocks", partial(apply.compile_blocks, backend="aot_eager")),
        ):
            engine = build(case, mesh, config)
        losses.append([float(engine.train_step(batches).loss) for _ in range(2)])
    assert counters["stats"]["unique_graphs"] == 2, counters["stats"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def check(case: Case, mesh: Mesh, config: ParallelConfig) -> None:
    (check_compiled if mesh.axes.tp > 1 else check_sharded)(case, mesh, config)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("ranks"), CASES, 3, function=check)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_ranks_agree(name: str, found: dict[str, Any]) -> None:
    assert found[name] is None, found[name]
