"""A run that was saved on one layout goes on, on any other, as if nothing had happened."""

from pathlib import Path

import pytest
import torch

import generate
from conf.schema import GenerateConfig
from launch.ranks import free_port
from parallel.config import Device
from tests.conftest import exported, metrics, run_ranks, trained
from tests.resume_rank import MUON, PAIRS, SAVED, STEPS, WORLD_SIZE, main
from training.checkpoint import open_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, small: list[str]) -> Path:
    """Folders of runs: each layout until it was saved, each pair to its end, and one that nobody stopped."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "stop").write_text(str(SAVED))
    (folder / "own.jsonl").write_text('{"context": "import", "continuations": [" os", " sys"], "answer": 0}\n')
    overrides = [o for o in small if not o.startswith(("global_batch_tokens", "data.micro_batch_size", "steps"))]
    overrides += ["global_batch_tokens=256", "valid_tokens=256", f"evaluate.tasks=[{folder / 'own.jsonl'}]"]
    overrides += ["samples.prompts=['import']", "samples.max_new_tokens=4", "samples.temperature=0"]
    overrides += ["model.vocab_size=1000"]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(WORLD_SIZE)}
    assert run_ranks(main, WORLD_SIZE, folder, overrides, meeting) == [0] * WORLD_SIZE
    for name, settings in (("whole", []), ("muon_whole", MUON)):
        trained(folder / name, *overrides, *settings, f"steps={STEPS}", "data.micro_batch_size=1")
    return folder


def values(run_dir: Path, key: str = "train/loss") -> dict[int, float]:
    return {record["step"]: record[key] for record in metrics(run_dir) if key in record}


@pytest.mark.parametrize("before,after", PAIRS, ids=lambda name: name)
def test_resume_across_layouts(runs: Path, before: str, after: str) -> None:
    """Case 20: what is restored is what was saved, and losses, scores and samples are those of a single process."""
    saved = open_checkpoint(runs / before).read("")
    again = open_checkpoint(runs / f"{before}_{after}" / "again").read("")
    assert {name for name in saved.keys() ^ again.keys() if not name.startswith("rng.")} == set()
    assert all(torch.equal(saved[name], again[name]) for name in saved.keys() & again.keys())

    whole, here = runs / ("muon_whole" if before.startswith("muon_") else "whole"), runs / f"{before}_{after}"
    expected, losses = values(whole), values(here)
    assert sorted(losses) == list(range(1, STEPS + 1))
    # The same weights give the same loss; only sums over ranks are made in another order.
    assert losses[SAVED + 1] == pytest.approx(expected[SAVED + 1], rel=1e-6)
    assert losses[STEPS] == pytest.approx(expected[STEPS], rel=1e-5)
    assert values(here, "evaluation/own/bpb") == pytest.approx(values(whole, "evaluation/own/bpb"), rel=1e-5)
    assert list(values(here, "samples")) == [STEPS] and values(here, "samples") == values(whole, "samples")


@pytest.mark.parametrize("layout", ["hybrid", "muon_zero1"])
def test_resume_is_bit_exact_on_the_same_layout(runs: Path, layout: str) -> None:
    assert values(runs / f"{layout}_{layout}") == values(runs / f"{layout}_whole")
    whole, again = (open_checkpoint(runs / f"{layout}_{end}").read("") for end in ("whole", layout))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("layout", ["zero3", "muon_3d"])
def test_export_of_a_sharded_run(runs: Path, layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, hf = str(runs / layout), str(exported(runs / layout, tmp_path / "hf"))
    assert f"exported step {SAVED} of {run}" in capsys.readouterr().out
    texts = []
    for source in (GenerateConfig(run=run), GenerateConfig(hf=hf)):
        source.max_new_tokens, source.device = 8, Device.cpu
        texts += generate.Writer(source).write([(0, "def", 0)])
    assert texts[0] == texts[1] != ""
