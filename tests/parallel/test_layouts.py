"""Every layout trains like one process: losses, norms, weights and totals agree in float32 to 5e-6."""

from functools import cache, partial
from typing import Any

import pytest
import torch

from parallel.config import ActivationCheckpointing, Schedule
from tests.parallel.layouts import N_STEPS, Case, Outcome, alone, run
from training.config import Reduction

# Tensor- and context-parallel ranks all run every micro-batch, so fewer of them do.
few = partial(Case, n_micro_batches=4)

RECOMPUTED = {"activation_checkpointing": ActivationCheckpointing.full}
SELECTIVE = {"activation_checkpointing": ActivationCheckpointing.selective}
INTERLEAVED = {"pp": 2, "virtual_stages": 2, "pipeline_schedule": Schedule["interleaved_1f1b"]}

ZERO = {
    "ddp_2": Case(2, layout={"dp_replicate": 2}),
    "zero1_2": Case(2, layout={"dp_shard": -1, "zero_stage": 1}),
    "zero2_4": Case(4, "biased", layout={"dp_shard": -1, "zero_stage": 2}),
    "zero3_4": Case(4, "biased", layout={"dp_shard": -1, "zero_stage": 3}),
    "zero3_tied_2": Case(2, "tied", layout={"dp_shard": -1, "zero_stage": 3}),
    "hybrid1_4": Case(4, layout={"dp_replicate": 2, "dp_shard": 2, "zero_stage": 1}),
    "hybrid2_4": Case(4, layout={"dp_replicate": 2, "dp_shard": 2, "zero_stage": 2}),
    "hybrid3_4": Case(4, layout={"dp_replicate": 2, "dp_shard": 2, "zero_stage": 3}),
    "zero3_recomputed_2": Case(2, "biased", layout={**RECOMPUTED, "dp_shard": 2, "zero_stage": 3}),
    "row_mean_4": Case(4, reduction=Reduction.micro_batch_mean, layout={"dp_shard": 4, "zero_stage": 1}),
    "aux_zero3_selective_2": Case(2, regularized=True, layout={**SELECTIVE, "dp_shard": 2, "zero_stage": 3}),
    "one_rank_is_bad_4": Case(4, layout={"dp_shard": 4, "zero_stage": 2}, bad_rank=2),
    "one_rank_is_bad_tp_4": few(4, layout={"dp_shard": 2, "tp": 2, "zero_stage": 1}, bad_rank=3),
    "one_rank_is_bad_pp_4": Case(4, layout={"pp": 2, "dp_shard": 2, "zero_stage": 1}, bad_rank=1),
}
TENSOR = {
    "tp_2": few(2, layout={"tp": 2}),
    "tp_4_biased": few(4, "biased", layout={"tp": 4}),
    "tp_2_no_sp": few(2, "biased", layout={"tp": 2, "sequence_parallel": False}),
    "tp_2_tied": few(2, "tied", layout={"tp": 2}),
    "selective_tp_zero1_4": few(4, "biased", layout={**SELECTIVE, "dp_shard": 2, "tp": 2, "zero_stage": 1}),
    "aux_tp_ddp_4": few(4, regularized=True, layout={"dp_replicate": 2, "tp": 2}),
}
CONTEXT = {
    "cp_2_ddp": few(2, "biased", layout={"cp": 2}),
    "cp_4_zero1": few(4, layout={"cp": 4, "zero_stage": 1}),
    "cp_8_kv_repeated": few(8, "biased", layout={"cp": 8, "zero_stage": 3}),
    "aux_cp_2": few(2, regularized=True, layout={"cp": 2}),
}
COMPLETEP = {
    "completep_zero3_tp_4": few(4, "completep", layout={"dp_shard": 2, "tp": 2, "zero_stage": 3}),
    "completep_pp_cp_4": few(4, "completep", layout={"pp": 2, "cp": 2, "zero_stage": 1}),
}
PIPELINE = {
    "pp_2": Case(2, "biased", layout={"pp": 2}),
    "aux_pp_dp_4": Case(4, regularized=True, layout={"pp": 2, "dp_replicate": 2}),
    "pp_2_uneven": Case(2, layout={"pp": 2, "pipeline_layers": [1, 3]}),
    "interleaved_2": Case(2, "biased", layout=INTERLEAVED),
    "pp_tied_2": Case(2, "tied", layout={"pp": 2}),
    "pp_tied_tp_zero1_8": Case(8, "tied", layout={"pp": 2, "dp_shard": 2, "tp": 2, "zero_stage": 1}),
    "pp_zero2_4": Case(4, "biased", layout={"pp": 2, "dp_shard": 2, "zero_stage": 2}),
    "pp_4": Case(4, layout={"pp": 4}),
    "pp_tp_zero3_8": Case(8, "biased", layout={"pp": 2, "dp_shard": 2, "tp": 2, "zero_stage": 3}),
    "interleaved_zero3_4": Case(4, layout={**INTERLEAVED, "dp_shard": 2, "zero_stage": 3}),
}
MUON = {
    "muon_hybrid1_4": Case(4, "biased", optimizer="muon", layout={"dp_replicate": 2, "dp_shard": 2, "zero_stage": 1}),
    "normuon_tp_zero3_8": Case(
        8, "biased", optimizer="muon", normuon=True,
        layout={"dp_replicate": 2, "dp_shard": 2, "tp": 2, "zero_stage": 3},
    ),
    "muon_pp_zero1_4": Case(4, optimizer="muon", layout={"pp": 2, "dp_shard": 2, "zero_stage": 1}),
    "normuon_tp_2": few(2, optimizer="muon", normuon=True, layout={"tp": 2}),
    "muon_cp_tp_zero2_8": few(8, "biased", optimizer="muon", layout={"dp_shard": 2, "cp": 2, "tp": 2, "zero_stage": 2}),
}  # fmt: skip
own = partial(few, optimizer="tests.training.test_seams:Momentum")  # a rule from outside
OWN = {
    "own_rule_tp_zero3_4": own(4, "biased", layout={"dp_shard": 2, "tp": 2, "zero_stage": 3}),
    "own_rule_pp_cp_4": own(4, layout={"pp": 2, "cp": 2, "zero_stage": 1}),
}
shared = partial(Case, shares_memory=True)
SHARED = {
    "async_tp_2": shared(2, "biased", n_micro_batches=4, layout={**SELECTIVE, "async_tp": True, "tp": 2}),
    "async_tp_4_aux": shared(4, regularized=True, n_micro_batches=4, layout={"async_tp": True, "tp": 4}),
    "async_tp_zero3_4": shared(
        4, "biased", n_micro_batches=4, layout={"async_tp": True, "dp_shard": 2, "tp": 2, "zero_stage": 3}
    ),
    "shared_zero1_4": shared(4, layout={"dp_shard": 4, "zero_stage": 1}),
    "shared_zero2_2": shared(2, "biased", layout={"dp_shard": 2, "zero_stage": 2}),
    "shared_hybrid3_4": shared(4, "tied", layout={"dp_replicate": 2, "dp_shard": 2, "zero_stage": 3}),
    "shared_zero1_in_graphs_2": shared(2, in_graphs=True, layout={"dp_shard": 2, "zero_stage": 1}),
    "shared_zero3_in_graphs_2": shared(2, in_graphs=True, layout={"dp_shard": 2, "zero_stage": 3}),
}
BF16 = {
    "bf16_tp_zero2_4": Case(4, "biased", dtype=torch.bfloat16, layout={"dp_shard": 2, "tp": 2, "zero_stage": 2}),
    "bf16_pp_zero1_4": Case(4, "biased", dtype=torch.bfloat16, layout={"pp": 2, "dp_shard": 2, "zero_stage": 1}),
}
CASES = {**BF16, **PIPELINE, **ZERO, **TENSOR, **CONTEXT, **COMPLETEP, **MUON, **OWN, **SHARED}


# One group of processes runs all layouts, and the first test waits for them.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2700)]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome | str]:
    """The results of the selected cases."""
    items: list[Any] = [item for item in request.session.items if "outcomes" in getattr(item, "fixturenames", ())]
    cases = {item.callspec.params["name"]: CASES[item.callspec.params["name"]] for item in items}
    return run(tmp_path_factory.mktemp("ranks"), cases, max(case.world_size for case in cases.values()))


@pytest.fixture
def here(name: str, outcomes: dict[str, Outcome | str]) -> Outcome:
    """The outcome of a case."""
    found = outcomes[name]
    assert isinstance(found, Outcome), found
    return found


@pytest.fixture
def one(name: str) -> Outcome:
    """The same steps in one process."""
    keys = ("model", "reduction", "n_micro_batches", "regularized", "optimizer", "normuon")
    return _alone(tuple((key, getattr(CASES[name], key)) for key in keys))


@cache
def _alone(settings: tuple[tuple[str, Any], ...]) -> Outcome:
    return alone(Case(1, **dict(settings)))


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.bad_rank is None and n not in BF16])
def test_equals_one_process(name: str, here: Outcome, one: Outcome) -> None:
    assert max(one.norms) > 0.3, "nothing was clipped"
    assert here.losses == pytest.approx(one.losses, rel=1e-6)
    assert here.norms == pytest.approx(one.norms, rel=5e-6)
    assert here.valid == pytest.approx(one.valid, rel=1e-6)
    for mine, its in zip(here.totals, one.totals, strict=True):
        assert mine == pytest.approx(its, rel=1e-6)
    assert all(one.aux) == CASES[name].regularized
    for mine, its in zip(here.aux, one.aux, strict=True):
        assert mine == pytest.approx(its, rel=1e-6)
    assert here.weights.keys() == one.weights.keys()
    for weight, value in one.weights.items():
        torch.testing.assert_close(here.weights[weight], value, rtol=0, atol=2e-6, msg=weight)


@pytest.mark.parametrize("name", list(BF16))
def test_bf16_learns_alike(here: Outcome, one: Outcome) -> None:
    assert here.losses == pytest.approx(one.losses, rel=5e-3)
    assert here.norms == pytest.approx(one.norms, rel=3e-2)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.bad_rank is not None])
def test_all_ranks_skip_a_step_that_is_nonfinite_on_one(here: Outcome) -> None:
    """Case 40."""
    assert here.finite == [number != 2 for number in range(N_STEPS)]
    assert here.bad_layer == "blocks.1.mlp.w_up (forward)"
    assert all(torch.isfinite(weight).all() for weight in here.weights.values())
