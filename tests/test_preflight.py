"""What keeps a sweep from starting is said once, before any point starts, and leaves no trace of points."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from conf.cli import CONF, SweepError, data_settings
from conf.schema import register
from corpus.config import DataError, Source
from data.config import DataConfig
from data.manifest import check_exists
from launch import jobs, slurm
from launch.sweep import Composed, run_points
from parallel.config import ParallelError
from tests.conftest import ROOT, trained
from tracking.run_folder import SWEEP_LOCK, locked
from tracking.status import read_status
from training.config import CheckpointError

RATES = ("1e-3", "1e-2")


def points(folder: Path, *overrides: str, command: str = "train") -> list[Composed]:
    """Compose two points, of two learning rates or of two shards."""
    register()
    varied = [f"optimizer.lr={r}" for r in RATES] if command == "train" else ["shard=0", "shard=1"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = [compose(command, overrides=[*overrides, label], return_hydra_config=True) for label in varied]
    found = []
    for number, (label, cfg) in enumerate(zip(varied, composed, strict=True)):
        with open_dict(cfg):
            found.append(Composed(label, cfg, folder / f"point{number}", cfg.pop("hydra")))
    return found


def refused(folder: Path, *overrides: str, command: str = "train") -> str:
    """Ask for two points that cannot start and give what is said."""
    with pytest.raises((SweepError, ParallelError)) as error:
        run_points(command, points(folder, *overrides, command=command), folder)
    assert not any(read_status(path) for path in folder.glob("*/")), "a point that is refused is not in the queue"
    return str(error.value)


@pytest.mark.parametrize("options", [["-m", "optimizer.lr=1e-3,1e-2"], ["experiment=lr_sweep"]])
def test_a_sweep_without_its_corpus_is_refused_once_and_without_torch(tmp_path: Path, options: list[str]) -> None:
    argv = [sys.executable, "-X", "importtime", "train.py", *options, f"data.path={tmp_path / 'no'}"]
    done = subprocess.run([*argv, f"hydra.sweep.dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    told = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 1 and " torch\n" not in done.stderr
    remedy = f"python prepare_data.py data=builtin data.path={tmp_path / 'no'}"
    assert told == [f"error: there is no prepared data in {tmp_path / 'no'}; run: {remedy}"]
    assert not list(tmp_path.glob("optimizer*"))


@pytest.mark.parametrize(
    ("typed", "remedy"),
    [
        ("data.seq_len=8 data.workers=0 +data.mix.a=2 data.packing=concat data.name=x", "data.name=x data.input=..."),
        ("steps=3 data.input=texts data.text_key=body", "data.input=texts data.text_key=body"),
        ("+data.sources.a=texts", "data.sources.a=texts"),
    ],
)
def test_the_command_that_prepares_has_what_it_needs_and_no_more(tmp_path: Path, typed: str, remedy: str) -> None:
    hydra = OmegaConf.create({"overrides": {"task": typed.split()}, "runtime": {"choices": {"data": "local"}}})
    config = DataConfig(
        name="x", path=str(tmp_path / "no"), source=Source.local, input="texts" if "data.input" in typed else None,
        sources={"a": "texts"} if "sources" in typed else {}, seq_len=8, micro_batch_size=1,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"; run: python prepare_data.py ") as error:
        check_exists(config, data_settings(hydra))
    assert str(error.value).endswith(f"; run: python prepare_data.py data=local {remedy}")


def test_weights_that_are_not_there_are_told_at_the_points_that_ask_for_them(tmp_path: Path, small: list[str]) -> None:
    assert refused(tmp_path, *small, "init_from=/nowhere").startswith("init_from (/nowhere) is no folder; name a run")
    with pytest.raises(SweepError, match=r"there is no prepared data in /no; run: .* \(at optimizer.lr=1e-2\)$"):
        good, bad = points(tmp_path, *small)
        bad.cfg.data.path = "/no"
        run_points("train", [good, bad], tmp_path)


def test_text_that_is_not_there_is_told_once_for_all_shards(tmp_path: Path) -> None:
    paths = ["data=local", "data.input=/nowhere", f"data.path={tmp_path / 'tokens'}", "shards=2"]
    told = refused(tmp_path, *paths, command="prepare_data")
    assert told.startswith("data.input (/nowhere) names no file") and "\n" not in told


def test_a_folder_of_another_run_is_refused_before_any_point_starts(tmp_path: Path, small: list[str]) -> None:
    folder = tmp_path / "point0"
    trained(folder, *small, "steps=1")
    told = refused(tmp_path, *small, "steps=2")
    assert f"{folder} was begun with another configuration: " in told and told.endswith("(at optimizer.lr=1e-3)")
    with locked(folder):
        told = refused(tmp_path, *small, "steps=1")
    assert f"{folder} is in use by process " in told


def test_points_that_would_share_a_folder_are_refused(tmp_path: Path, small: list[str]) -> None:
    composed = [point._replace(run_dir=tmp_path) for point in points(tmp_path, *small)]
    with pytest.raises(SweepError, match=r"optimizer.lr=1e-3 and optimizer.lr=1e-2 would share .*; let hydra.sweep"):
        run_points("train", composed, tmp_path)


def test_a_job_that_wants_more_gpus_than_there_are_is_refused(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "visible_gpus", lambda: 0)
    told = refused(tmp_path, *small, "launcher.gpus_per_node=2")
    assert told == "launcher.gpus_per_node (2) must be at most the number of GPUs here (0)"


def test_nodes_of_slurm_are_asked_for_what_a_run_reads(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[tuple[Path, str]]] = []

    def check(_config: Any, _folder: Path, needed: list[tuple[Path, str]]) -> None:
        asked.append(needed)
        raise ParallelError("no")

    monkeypatch.setattr(slurm, "check", check)
    options = [*small, "launcher=slurm", f"init_from={tmp_path / 'away'}"]
    corpus = Path(next(option.removeprefix("data.path=") for option in small if option.startswith("data.path=")))
    assert refused(tmp_path / "runs", *options) == "no"
    origin = f"init_from ({tmp_path / 'away'}) is no folder; name a run, a checkpoint, or a Hugging Face folder"
    assert asked == [[(corpus / "corpus.json", ""), (tmp_path / "away", origin)] * 2]


def test_a_dry_run_is_done_at_every_point_and_starts_no_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dry_run.run.run_dry_run", lambda config: print(f"rehearsed {config.optimizer.lr}"))
    monkeypatch.setattr(jobs, "run_jobs", lambda *_: pytest.fail("a job was started"))
    composed = points(
        tmp_path, "data=random", "data.seq_len=64", "launcher=slurm", "launcher.nodes=2", "dry_run='true'"
    )
    assert run_points("train", composed, tmp_path) == [None, None]
    said = capsys.readouterr().out
    assert said == "\n== optimizer.lr=1e-3\nrehearsed 0.001\n\n== optimizer.lr=1e-2\nrehearsed 0.01\n"
    composed[1].cfg.dry_run.enabled = False
    with pytest.raises(SweepError, match=r"dry_run \(optimizer.lr=1e-2\) must be the same at all points"):
        run_points("train", composed, tmp_path)


def test_what_a_corpus_and_a_machine_do_not_go_with_is_told_before_any_point_starts(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.ranks.visible_gpus", lambda: 0)
    told = {
        "model.vocab_size=128": "pieces, more than model.vocab_size (128); pass model.vocab_size=",
        "+data.mix.fr=1": "data.mix.fr: there is no such source; choose from ",
        "precision=fp8": "precision.fp8 (tensorwise) needs a GPU of compute capability 8.9 or more",
        "parallel.cuda_graphs=true": "parallel.cuda_graphs (true) needs a CUDA device, not cpu; choose false",
    }
    for override, sentence in told.items():
        assert sentence in refused(tmp_path, *small, "parallel.device=auto", override), override


def test_a_sweep_in_whose_folder_another_is_is_refused(tmp_path: Path, small: list[str]) -> None:
    with (
        locked(tmp_path, name=SWEEP_LOCK),
        pytest.raises(CheckpointError, match=r"is in use by process \d+ on .*; wait"),
    ):
        run_points("train", points(tmp_path, *small), tmp_path)
    assert not list(tmp_path.glob("point*"))
