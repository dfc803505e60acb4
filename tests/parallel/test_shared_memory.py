"""Layouts whose ranks read each other's memory, and products that overlap with it, train like one process.

Files that all processes map stand in for the memory of GPUs.
"""

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel import async_tp, zero
from parallel.config import ParallelConfig
from parallel.mesh import Mesh
from parallel.parallelize import allocate
from parallel.peers import Buffer
from parallel.shards import matrices_first
from tests.parallel.layouts import Case, Outcome, alone, outcome, run

few = partial(Case, n_micro_batches=4)
ASYNC = {"async_tp": True}
CASES = {
    "async_tp_2": few(2, "biased", layout={**ASYNC, "tp": 2}),
    "async_tp_4_aux": few(4, regularized=True, layout={**ASYNC, "tp": 4}),
    "async_tp_zero3_4": few(4, "biased", layout={**ASYNC, "dp_shard": 2, "tp": 2, "zero_stage": 3}),
    "zero1_4": Case(4, layout={"dp_shard": 4, "zero_stage": 1}),
    "zero2_2": Case(2, "biased", layout={"dp_shard": 2, "zero_stage": 2}),
    "hybrid3_4": Case(4, "tied", layout={"dp_replicate": 2, "dp_shard": 2, "zero_stage": 3}),
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class FileBuffer(Buffer):
    folder = Path()
    count = 0  # of buffers that this process has made: ranks of a group make them in the same order

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup) -> None:
        FileBuffer.count += 1
        self.rank, self.size, self.group, self.n, self.dtype = group.rank(), group.size(), group, n, dtype
        self.name = f"{dist.get_process_group_ranks(group)}-{self.count}"
        self.local = self.of(self.rank, 0, n)
        dist.barrier(group)

    def of(self, rank: int, start: int, n: int) -> Tensor:
        path = str(self.folder / f"{self.name}-{rank}")
        return torch.from_file(path, shared=True, size=self.n, dtype=self.dtype)[start : start + n]

    def others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def barrier(self) -> None:
        dist.barrier(self.group)


def shared_outcome(folder: Path, case: Case, mesh: Mesh, config: ParallelConfig) -> Outcome:
    FileBuffer.folder, FileBuffer.count = folder, 0
    with pytest.MonkeyPatch.context() as patches:
        for module in (async_tp, zero):
            patches.setattr(module, "can_share", lambda group, device: group.size() > 1)
            patches.setattr(module, "SharedBuffer", FileBuffer)
        return outcome(case, mesh, config)


@pytest.fixture(scope="module")
def shared_outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome | str]:
    folder = tmp_path_factory.mktemp("ranks")
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        (folder / name).mkdir()
        found |= run(folder / name, {name: case}, case.world_size, function=partial(shared_outcome, folder / name))
    return found


@cache
def _alone(settings: tuple[tuple[str, Any], ...]) -> Outcome:
    return alone(Case(1, **dict(settings)))


@pytest.mark.parametrize("name", CASES)
def test_layout_equals_one_process(name: str, shared_outcomes: dict[str, Outcome | str]) -> None:
    here, case = shared_outcomes[name], CASES[name]
    one = _alone(tuple((key, getattr(case, key)) for key in ("model", "n_micro_batches", "regularized")))
    assert isinstance(here, Outcome), here
    assert here.losses == pytest.approx(one.losses, rel=5e-6)
    assert here.norms == pytest.approx(one.norms, rel=1e-5)
    assert here.valid == pytest.approx(one.valid, rel=5e-6)
    for its, ours in zip(one.aux, here.aux, strict=True):
        assert ours == pytest.approx(its, rel=5e-6)
    apart = {name: float((here.weights[name] - weight).abs().max()) for name, weight in one.weights.items()}
    assert max(apart.values()) < 5e-6, apart


def test_weights_of_one_input_are_joined_without_a_copy() -> None:
    module = torch.nn.ModuleList(torch.nn.Linear(8, rows) for rows in (8, 4, 4))
    allocate(module, torch.float32, torch.device("cpu"))
    for param in module.parameters():
        torch.nn.init.normal_(param)
    weights = [layer.weight.detach() for layer in module]  # type: ignore[union-attr]
    joined = async_tp.join(weights)
    assert joined.data_ptr() == weights[0].data_ptr()
    assert torch.equal(joined, torch.cat(weights))
    assert [name.split(".")[1] for name, _ in matrices_first(module)] == ["weight"] * 3 + ["bias"] * 3
    apart = [torch.randn(3, 8), torch.randn(2, 8)]
    assert torch.equal(async_tp.join(apart), torch.cat(apart))
