"""What keeps a run or a sweep from starting is reported once, before any point starts, and leaves no trace of points."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict

from conf.cli import CONF, checked, data_settings, is_user_error
from conf.schema import ConfigError, register
from corpus.config import DataError, Source
from data.config import DataConfig
from data.manifest import check_exists
from launch import jobs, slurm
from launch.sweep import SweepError, SweepPoint, run_points
from parallel.config import ParallelError
from tests.conftest import ROOT, trained
from tracking.run_folder import SWEEP_LOCK, locked
from tracking.status import read_status
from training.config import CheckpointError
from training.preflight import check_run

RATES = ("1e-3", "1e-2")


def points(folder: Path, *overrides: str, command: str = "train") -> list[SweepPoint]:
    """Compose two points, of two learning rates or of two shards."""
    register()
    varied = [f"optimizer.lr={r}" for r in RATES] if command == "train" else ["shard=0", "shard=1"]
    found = []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for number, label in enumerate(varied):
            cfg = compose(command, overrides=[*overrides, label], return_hydra_config=True)
            with open_dict(cfg):
                settings = data_settings(cfg.pop("hydra"))
            found.append(SweepPoint(label, folder / f"point{number}", checked(cfg), (), settings))
    return found


def composed(*overrides: str) -> DictConfig:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=["name=x", *overrides])


def run(these: list[SweepPoint], folder: Path) -> None:
    run_points(these, folder, check=lambda p: check_run(p.config, p.run_dir, p.settings), is_user_error=is_user_error)


def refused(folder: Path, *overrides: str, command: str = "train") -> str:
    """Ask for two points that cannot start and return the error."""
    with pytest.raises((SweepError, ParallelError)) as error:
        run(points(folder, *overrides, command=command), folder)
    assert not any(read_status(path) for path in folder.glob("*/")), "a point that is refused is not in the queue"
    return str(error.value)


@pytest.mark.parametrize("options", [["-m", "optimizer.lr=1e-3,1e-2"], ["experiment=lr_sweep"]])
def test_sweep_without_its_corpus_is_refused_once_and_without_torch(tmp_path: Path, options: list[str]) -> None:
    argv = [sys.executable, "-X", "importtime", "train.py", *options, f"data.path={tmp_path / 'no'}"]
    done = subprocess.run([*argv, f"hydra.sweep.dir={tmp_path / 's/t'}"], cwd=ROOT, capture_output=True, text=True)
    reported = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 1 and " torch\n" not in done.stderr
    (error,) = reported
    assert error.endswith(f"run: python prepare_data.py data=builtin data.path={tmp_path / 'no'}")
    assert not (tmp_path / "s").exists(), "multirun.yaml neither"


@pytest.mark.parametrize(
    ("typed", "remedy"),
    [
        ("data.seq_len=8 data.workers=0 ++data.mix.a=2 data.packing=concat data.name=x", "data.name=x data.input=..."),
        ("steps=3 data.input=texts data.text_key=body", "data.input=texts data.text_key=body"),
        ("++data.sources.a=texts", "data.sources.a=texts"),
        ("data.name='笔记' data.text_key='7'", "'data.name=笔记' data.text_key=7 data.input=..."),
        ("data.name='\\${x}' data.text_key=007", "'data.name='\"'\"'${x}'\"'\"'' data.text_key=007 data.input=..."),
    ],
)
def test_remedy_has_the_settings_that_preparing_reads(tmp_path: Path, typed: str, remedy: str) -> None:
    runtime = {"choices": {"data": "local"}, "config_sources": []}
    hydra = OmegaConf.create({"overrides": {"task": typed.split(), "hydra": []}, "runtime": runtime})
    config = DataConfig(
        name="x", path=str(tmp_path / "no"), source=Source.local, input="texts" if "data.input" in typed else None,
        sources={"a": "texts"} if "sources" in typed else {}, seq_len=8, micro_batch_size=1,
    )  # fmt: skip
    with pytest.raises(DataError) as error:
        check_exists(config, data_settings(hydra))
    assert str(error.value).endswith(f"python prepare_data.py data=local {remedy}")


def test_missing_weights_and_data_are_reported_at_their_points(tmp_path: Path, small: list[str]) -> None:
    assert "init_from (/nowhere)" in refused(tmp_path, *small, "init_from=/nowhere")
    good, bad = points(tmp_path, *small)
    assert not isinstance(bad.config.data, str)
    bad = replace(bad, config=replace(bad.config, data=replace(bad.config.data, path="/no")))
    with pytest.raises(SweepError, match=r"/no.*\(at optimizer.lr=1e-2\)$"):
        run([good, bad], tmp_path)


def test_missing_text_is_reported_once_for_all_shards(tmp_path: Path) -> None:
    paths = ["data=local", "data.input=/nowhere", f"data.path={tmp_path / 'tokens'}", "shards=2"]
    error = refused(tmp_path, *paths, command="prepare_data")
    assert "data.input (/nowhere)" in error and "\n" not in error


def test_folder_of_another_run_is_refused(tmp_path: Path, small: list[str]) -> None:
    folder = tmp_path / "point0"
    trained(folder, *small, "steps=1")
    error = refused(tmp_path, *small, "steps=2")
    assert str(folder) in error and "steps (1, now 2)" in error and error.endswith("(at optimizer.lr=1e-3)")
    with locked(folder):
        assert f"{folder} is in use by process " in refused(tmp_path, *small, "steps=1")
    never, must = (refused(tmp_path, *small, "steps=1", f"checkpoint.resume={how}") for how in ("never", "must"))
    assert f"checkpoint.resume (never): {folder} holds step-00000001" in never and "point0" not in must
    assert f"checkpoint.resume (must): {tmp_path / 'point1'} holds no checkpoint" in must


def test_sweeps_and_points_do_not_share_a_folder(tmp_path: Path, small: list[str]) -> None:
    found = points(tmp_path, *small)
    with pytest.raises(SweepError, match=r"hydra.sweep.subdir"):
        run([replace(point, run_dir=tmp_path) for point in found], tmp_path)
    with locked(tmp_path, name=SWEEP_LOCK), pytest.raises(CheckpointError, match=r"is in use by process \d+ on "):
        run(found, tmp_path)
    assert not list(tmp_path.glob("point*"))


def test_more_gpus_than_there_are_is_refused(tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "visible_gpus", lambda: 0)
    assert "launcher.gpus_per_node (2)" in refused(tmp_path, *small, "launcher.gpus_per_node=2")


def test_slurm_nodes_are_asked_for_what_a_run_reads(
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
    (needed,) = asked
    assert [path for path, _ in needed] == [corpus / "corpus.json", tmp_path / "away"] * 2
    assert [bool(error) for _, error in needed] == [False, True] * 2 and "init_from" in needed[1][1]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("precision=fp8", "precision.fp8 (tensorwise)"),
        ("parallel.cuda_graphs=true", "parallel.cuda_graphs (true)"),
    ],
)
def test_what_corpus_or_machine_cannot_do_is_refused(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch, override: str, expected: str
) -> None:
    monkeypatch.setattr("launch.environment.visible_gpus", lambda: 0)
    assert expected in refused(tmp_path, *small, "parallel.device=auto", override)


def test_vocabulary_length_and_mixture_are_reported_together(small: list[str]) -> None:
    wrong = ["model.vocab_size=128", "data.seq_len=128", "data.pack_len=128", "global_batch_tokens=512"]
    with pytest.raises(ConfigError) as error:
        checked(composed(*small, *wrong))
    length, vocabulary = str(error.value).splitlines()
    assert length.startswith("data.seq_len (128)") and vocabulary.endswith("pass model.vocab_size=1024")
    with pytest.raises(ConfigError, match=r"data.mix.fr: .*choose from code, prose"):
        checked(composed(*small, "++data.mix.fr=1"))
    with pytest.raises(ConfigError, match=r"model.vocab_size \(many\) must be a number"):
        checked(composed(*small, "model.vocab_size=many"))


@pytest.mark.parametrize("model", ["tiny", "125m"])
def test_vocabulary_is_the_datas(small: list[str], tmp_path: Path, model: str) -> None:
    choices = [f"model={model}", "data=local", "parallel.device=cpu"]
    prepared = next(option for option in small if option.startswith("data.path="))
    found = {
        "prepared": [*choices, prepared],  # a tokenizer of 1,000 pieces
        "not prepared": [*choices, f"data.path={tmp_path}", "data.vocab_size=5000"],
        "random": [*choices, "data=random", "data.vocab_size=300"],
        "stated": [*choices, prepared, "model.vocab_size=2000"],
        "quoted": [*choices, prepared, "model.vocab_size='2000'"],
    }
    sizes = {name: checked(composed(*options)).model.vocab_size for name, options in found.items()}
    assert sizes == {"prepared": 1024, "not prepared": 5120, "random": 384, "stated": 2000, "quoted": 2000}
    assert checked(composed("model=7b", "data=random", "parallel.device=cpu")).model.vocab_size == 103168
