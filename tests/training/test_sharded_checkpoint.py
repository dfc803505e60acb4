"""A checkpoint that several ranks write together is whole or not there, and loads in every other layout."""

from pathlib import Path

import pytest
import torch

from tests.conftest import run_ranks
from tests.training.sharded_rank import SIZE, WHOLE, main
from training.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int | None]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_ranks(main, SIZE, folder)


def test_every_layout_loads_every_other(ranks: tuple[Path, list[int | None]]) -> None:
    folder = ranks[0]
    for name in ("plain", "stages", "flat", "hybrid", "both", "whole"):
        alone = open_checkpoint(folder / name)
        assert set(alone.tensors) == set(WHOLE)
        for key, tensor in alone.read("").items():
            assert torch.equal(tensor, WHOLE[key]), f"{key} of {name}, read by one process"


def test_a_damaged_part_of_one_rank_is_named_once(ranks: tuple[Path, list[int | None]]) -> None:
    logs = "".join(path.read_text() for path in ranks[0].glob("*.log")).splitlines()
    first, second = (line for line in logs if "set aside" in line)
    assert "step-00000003/__1_0.distcp is damaged" in first and "step-00000002/__1_0.distcp has 100 bytes" in second


def test_a_rank_killed_while_saving_commits_nothing(ranks: tuple[Path, list[int | None]]) -> None:
    """Case 1."""
    folder, ended = ranks
    assert ended == [0, -9, 0, 0]
    assert open_checkpoint(folder / "killed").step == 1
    assert [path.name for path in (folder / "killed" / "checkpoints").glob("step-*")] == ["step-00000001"]
