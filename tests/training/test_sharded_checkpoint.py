"""A checkpoint that several ranks write together is whole or not there, and loads in every other layout."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.training.sharded_rank import WHOLE
from training.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow


def run_ranks(folder: Path, scenarios: str, size: int = 4) -> list[tuple[int, str]]:
    """Run scenarios on `size` ranks; return each rank's exit code and what it wrote on stderr."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.sharded_rank"]
    commands = [[*command, str(rank), str(size), str(folder), scenarios] for rank in range(size)]
    settings: Any = {
        "cwd": ROOT,
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},
        "stderr": subprocess.PIPE,
        "text": True,
    }
    ranks = [subprocess.Popen(command, **settings) for command in commands]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, errors, strict=True)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str]]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_ranks(folder, "pairs,rng,rule,faults,agreement")


def test_every_layout_loads_every_other(ranks: tuple[Path, list[tuple[int, str]]]) -> None:
    folder, ended = ranks
    assert all(code == 0 for code, _ in ended), "\n".join(text for _, text in ended)
    saved = [path for path in folder.iterdir() if path.is_dir() and path.name not in ("rng", "faults")]
    assert len(saved) == 6
    for path in saved:
        alone = open_checkpoint(path)
        assert set(alone.tensors) == set(WHOLE)
        for name, tensor in alone.read("").items():
            assert torch.equal(tensor, WHOLE[name]), f"{name} of {path.name}, read by one process"


def test_a_damaged_part_of_one_rank_is_named_once(ranks: tuple[Path, list[tuple[int, str]]]) -> None:
    lines = [line for _, text in ranks[1] for line in text.splitlines() if "set aside" in line]
    assert len(lines) == 2, lines
    assert "step-00000003/__1_0.distcp is damaged" in lines[0]
    assert "step-00000002/__1_0.distcp has 100 bytes" in lines[1]


def test_a_rank_killed_while_saving_commits_nothing(tmp_path: Path) -> None:
    """Case 1."""
    ended = run_ranks(tmp_path, "killed")
    assert [code for code, _ in ended] == [0, -9, 0, 0], "\n".join(text for _, text in ended)
    assert open_checkpoint(tmp_path / "killed").step == 1
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").glob("step-*")] == ["step-00000001"]
