"""Layouts on two GPUs over NCCL train like one GPU: eager in float32, and compiled in bf16."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import Attention
from parallel.config import ActivationCheckpointing, Compile
from tests.parallel.layouts import N_MICRO_BATCHES, Case, Outcome, run
from tests.parallel.test_layouts import BF16, CASES

N_GPUS = torch.cuda.device_count()


def _eager(case: Case) -> Case:
    # The only attention that sums in a fixed order, and in float32 throughout.
    layout = {**case.layout, "compile": Compile.none}
    return replace(case, attention=Attention.reference, layout=layout, n_micro_batches=N_MICRO_BATCHES)


def _compiled(optimizer: str = "adamw", **layout: Any) -> Case:
    # Torch's own kernel: FlashAttention 4 takes a minute to compile.
    return Case(2, "wide", dtype=torch.bfloat16, attention=Attention.varlen, optimizer=optimizer, layout=layout)


ONE = {f"one_{model}": _eager(Case(1, model)) for model in ("plain", "biased", "tied")}
ONE["one_plain_aux"] = _eager(Case(1, "plain", regularized=True))
EXACT = {
    name: _eager(case)
    for name, case in CASES.items()
    # Muon's matrices are bf16 on a GPU.
    if case.world_size == 2
    and name not in BF16
    and case.bad_rank is None
    and case.optimizer == "adamw"
    and not case.shares_memory  # by files; GPUs do anyway
}
COMPILED = {
    "zero1": _compiled(dp_shard=2, zero_stage=1),
    "zero3": _compiled(dp_shard=2, zero_stage=3),
    "zero3_recomputed": _compiled(
        dp_shard=2, zero_stage=3, activation_checkpointing=ActivationCheckpointing.full
    ),
    "tp": _compiled(tp=2),
    "tp_selective": _compiled(tp=2, activation_checkpointing=ActivationCheckpointing.selective),
    "tp_no_sp": _compiled(tp=2, sequence_parallel=False),
    "async_tp": _compiled(tp=2, async_tp=True),
    "cp": _compiled(cp=2),
    "pp": _compiled(pp=2),
    "zero1_graphs": _compiled(dp_shard=2, zero_stage=1, cuda_graphs=True),
    "zero3_graphs": _compiled(dp_shard=2, zero_stage=3, cuda_graphs=True),
    "async_tp_graphs": _compiled(tp=2, async_tp=True, cuda_graphs=True),
    "muon_tp": _compiled("muon", tp=2),
    "muon_zero1_graphs": _compiled("muon", dp_shard=2, zero_stage=1, cuda_graphs=True),
}  # fmt: skip
ALONE = {"one_wide": replace(_compiled(), world_size=1), "one_wide_muon": replace(_compiled("muon"), world_size=1)}
ALL = {**ONE, **EXACT, **ALONE, **COMPILED}

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900), pytest.mark.skipif(N_GPUS < 2, reason="needs two GPUs")]


@pytest.fixture(scope="module")
def references() -> dict[str, Outcome | str]:
    """The results of one GPU, filled as they are needed."""
    return {}


def _pair(name: str, folder: Path, references: dict[str, Outcome | str]) -> tuple[Outcome, Outcome]:
    """Return the results of a case on two GPUs, and of its model on one."""
    case = ALL[name]
    alone = f"one_{case.model}{'_aux' if case.regularized else ''}{'_muon' if case.optimizer == 'muon' else ''}"
    if alone not in references:
        references |= run(folder, {alone: ALL[alone]}, 1, "cuda")
    here, one = run(folder, {name: ALL[name]}, 2, "cuda")[name], references[alone]
    assert isinstance(one, Outcome), one
    assert isinstance(here, Outcome), here
    return here, one


@pytest.mark.parametrize("name", list(EXACT))
def test_layout_equals_one_gpu(name: str, tmp_path: Path, references: dict[str, Outcome | str]) -> None:
    here, one = _pair(name, tmp_path, references)
    assert here.losses == pytest.approx(one.losses, rel=2e-6)
    assert here.norms == pytest.approx(one.norms, rel=1e-5)
    assert here.valid == pytest.approx(one.valid, rel=2e-6)
    assert here.weights.keys() == one.weights.keys()
    apart = {name: float((here.weights[name] - value).abs().max()) for name, value in one.weights.items()}
    assert max(apart.values()) < 1e-5, apart


@pytest.mark.parametrize("name", list(COMPILED))
def test_compiled_bf16_learns_like_one_gpu(name: str, tmp_path: Path, references: dict[str, Outcome | str]) -> None:
    here, one = _pair(name, tmp_path, references)
    assert here.losses == pytest.approx(one.losses, rel=1e-2)
    assert here.norms == pytest.approx(one.norms, rel=5e-2)
