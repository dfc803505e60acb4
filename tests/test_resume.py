"""A run that was saved on one layout goes on, on any other, as if nothing had happened."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import export
import generate
from conf.schema import ExportConfig, GenerateConfig
from launch.ranks import free_port
from tests.conftest import ROOT, trained
from tests.resume_rank import MUON, PAIRS, SAVED, STEPS, TIED, WORLD_SIZE
from training.checkpoint import open_checkpoint
from training.config import Dtype

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, small: list[str]) -> Path:
    """Folders of runs: each layout until it was saved, each pair to its end, and one that nobody stopped."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "stop").write_text(str(SAVED))
    overrides = [o for o in small if not o.startswith(("global_batch_tokens", "data.micro_batch_size", "steps"))]
    overrides += ["global_batch_tokens=256", "valid_tokens=256", "model.n_layers=2"]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **meeting}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.resume_rank", str(folder), *overrides],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD_SIZE)
    ]
    errors = [rank.communicate(timeout=1700)[1] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(errors)
    for name, settings in (("whole", []), ("tied_whole", [TIED]), ("muon_whole", MUON)):
        trained(folder / name, *overrides, *settings, f"steps={STEPS}", "data.micro_batch_size=1")
    return folder


def losses(run_dir: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


@pytest.mark.parametrize("before,after", PAIRS, ids=lambda name: name)
def test_checkpoints_are_equal_across_layouts(runs: Path, before: str, after: str) -> None:
    """Case 20."""
    saved = open_checkpoint(runs / before).read("")
    again = open_checkpoint(runs / f"{before}_{after}" / "again").read("")
    names = {name for name in saved if not name.startswith("rng.")}
    assert names and names == {name for name in again if not name.startswith("rng.")}
    for name in names:
        assert torch.equal(saved[name], again[name]), name
    for name in saved.keys() & again.keys():
        assert torch.equal(saved[name], again[name]), name


@pytest.mark.parametrize("before,after", PAIRS, ids=lambda name: name)
def test_losses_go_on_across_layouts(runs: Path, before: str, after: str) -> None:
    """Case 20."""
    variant = before[:5] if before.startswith(("tied_", "muon_")) else ""
    whole, here = losses(runs / f"{variant}whole"), losses(runs / f"{before}_{after}")
    assert sorted(here) == list(range(1, STEPS + 1))
    # The same weights give the same loss; only sums over ranks are made in another order.
    assert here[SAVED + 1] == pytest.approx(whole[SAVED + 1], rel=1e-6)
    assert here[STEPS] == pytest.approx(whole[STEPS], rel=1e-5)


def test_resume_is_bit_exact_on_zero1(runs: Path) -> None:
    assert losses(runs / "zero1_zero1") == losses(runs / "zero1_whole")


@pytest.mark.parametrize("layout", ["zero3", "hybrid", "tp", "3d", "tied_3d"])
def test_one_process_exports_what_several_saved(
    runs: Path, layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, hf = str(runs / layout), str(tmp_path / "hf")
    export.export(runs / layout, ExportConfig(run=run, out=hf, dtype=Dtype.fp32))
    assert f"exported step {SAVED} of {run}" in capsys.readouterr().out
    texts = []
    for source in (GenerateConfig(run=run), GenerateConfig(hf=hf)):
        source = replace(source, max_new_tokens=8, device="cpu")
        saved, model = generate.load_model(source)
        texts += generate.write(model, saved, source, [(0, "def", 0)])
    assert texts[0] == texts[1] != ""
