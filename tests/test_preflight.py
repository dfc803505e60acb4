"""What keeps a run or a sweep from starting is reported once, before any point starts, and leaves no trace of points."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf, open_dict

from conf.cli import checked, data_settings
from conf.schema import ConfigError, TrainConfig, to_plain
from corpus.config import DataError, Source
from data.config import DataConfig
from data.manifest import check_exists
from launch import jobs
from launch.jobs import Job, Point
from launch.sweep import SweepError, run_points
from parallel.config import ParallelConfig, ParallelError
from tests.conftest import composed_cfg, ran, trained
from tracking.run_folder import SWEEP_LOCK, locked
from tracking.status import read_status
from training.config import CheckpointError
from training.preflight import check_run

RATES = ("1e-3", "1e-2")


def points(folder: Path, *overrides: str, command: str = "train") -> list[Point]:
    """Compose two points, of two learning rates or of two shards."""
    varied = [f"optimizer.lr={r}" for r in RATES] if command == "train" else ["shard=0", "shard=1"]
    found = []
    for number, label in enumerate(varied):
        cfg = composed_cfg(*overrides, label, command=command, return_hydra_config=True)
        with open_dict(cfg):
            settings = data_settings(cfg.pop("hydra"))
        config, run_dir = checked(cfg), folder / f"point{number}"
        parallel = config.parallel if isinstance(config, TrainConfig) else ParallelConfig()
        job = Job(f"{command}:work", (config, run_dir), run_dir, parallel, config.launcher)
        found.append(Point(label, job, to_plain(config), check=partial(check_run, config, run_dir, settings)))
    return found


def refused(folder: Path, *overrides: str, command: str = "train") -> str:
    """Ask for two points that cannot start and return the error."""
    with pytest.raises((SweepError, ParallelError)) as error:
        run_points(points(folder, *overrides, command=command), folder)
    assert not any(read_status(path) for path in folder.glob("*/")), "a point that is refused is not in the queue"
    return str(error.value)


@pytest.mark.parametrize("options", [["-m", "optimizer.lr=1e-3,1e-2"], ["experiment=lr_sweep", "launcher=slurm"]])
def test_sweep_without_its_corpus_is_refused_once_and_without_torch(tmp_path: Path, options: list[str]) -> None:
    settings = [f"data.path={tmp_path / 'no'}", f"hydra.sweep.dir={tmp_path / 's/t'}"]
    printed = ran("-X", "importtime", "train.py", *options, *settings, code=1).stderr
    assert " torch\n" not in printed
    (error,) = (line for line in printed.splitlines() if not line.startswith("import time:"))
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


@pytest.mark.parametrize(
    ("overrides", "command", "expected"),
    [
        (["init_from=/nowhere"], "train", "init_from (/nowhere)"),
        (["launcher=slurm", "init_from=/nowhere"], "train", "init_from (/nowhere)"),
        (["launcher.gpus_per_node=2"], "train", "launcher.gpus_per_node (2)"),
        (["data=local", "data.input=/nowhere", "shards=2"], "prepare_data", "data.input (/nowhere)"),
    ],
)
def test_what_a_point_lacks_is_reported_once(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch, overrides: list[str], command: str, expected: str
) -> None:
    monkeypatch.setattr(jobs, "visible_gpus", lambda: 0)
    settings = [*small, *overrides] if command == "train" else [*overrides, f"data.path={tmp_path / 'tokens'}"]
    error = refused(tmp_path / "runs", *settings, command=command)
    assert expected in error and "\n" not in error


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.mlp=my_lab.nope:X", "No module named"),
        ("model.attention_layer=model.layers:Nope", "no attribute"),
        ("optimizer.name=my_lab.ideas:Momentum", "No module named"),
        ("optimizer.name=torch.optim:SGD", "UpdateRule"),
        ("logger.extra=[my_lab.ideas:Nope,nope]", "No module named"),
    ],
)
def test_class_that_cannot_be_used_is_refused(small: list[str], setting: str, said: str) -> None:
    key, name = setting.split("=")
    with pytest.raises(ConfigError) as error:
        checked(composed_cfg(*small, setting))
    lines = str(error.value).splitlines()
    assert len(lines) == len(name.split(",")) and all(line.startswith(f"{key} (") and said in line for line in lines)
    checked(composed_cfg(*small, setting, "launcher=slurm", "launcher.setup=[rsync]"))


def test_data_that_a_jobs_setup_brings_may_be_missing_here(tmp_path: Path, small: list[str]) -> None:
    away = [*small, "launcher=slurm", f"init_from={tmp_path / 'away'}"]
    points(tmp_path, *away, "launcher.setup=[rsync]")[0].check()
    with pytest.raises(CheckpointError, match="init_from"):
        points(tmp_path, *away)[0].check()


@pytest.mark.parametrize("needs", ["precision.fp8=tensorwise", "parallel.cuda_graphs=true"])
def test_what_needs_a_gpu_is_refused_without_one(tmp_path: Path, small: list[str], needs: str) -> None:
    settings = [override for override in small if override not in ("precision=fp32", "parallel.device=cpu")]
    (point, _) = points(tmp_path, *settings, "precision=bf16", needs)
    with pytest.raises(ParallelError, match=needs.partition("=")[0]):
        point.check()


def test_folder_of_another_run_is_refused(tmp_path: Path, small: list[str]) -> None:
    folder = tmp_path / "point0"
    trained(folder, *small, "steps=1")
    error = refused(tmp_path, *small, "steps=2")
    assert str(folder) in error and "steps (1, now 2)" in error and error.endswith("(at optimizer.lr=1e-3)")
    with locked(folder):
        assert f"{folder} is in use by process " in refused(tmp_path, *small, "steps=1")
    never, must = (refused(tmp_path, *small, "steps=1", f"checkpoint.resume={how}") for how in ("never", "must"))
    assert f"checkpoint.resume (never): {folder} has step-00000001" in never and "point0" not in must
    assert f"checkpoint.resume (must): {tmp_path / 'point1'} has no checkpoint" in must


def test_sweeps_and_points_do_not_share_a_folder(tmp_path: Path, small: list[str]) -> None:
    found = points(tmp_path, *small)
    with pytest.raises(SweepError, match=r"hydra.sweep.subdir"):
        run_points([replace(point, job=replace(point.job, run_dir=tmp_path)) for point in found], tmp_path)
    with locked(tmp_path, name=SWEEP_LOCK), pytest.raises(CheckpointError, match=r"is in use by process \d+ on "):
        run_points(found, tmp_path)
    assert not list(tmp_path.glob("point*"))


def test_vocabulary_length_and_mixture_are_reported_together(small: list[str]) -> None:
    wrong = ["model.vocab_size=128", "data.seq_len=128", "data.pack_len=128", "global_batch_tokens=512"]
    with pytest.raises(ConfigError) as error:
        checked(composed_cfg(*small, *wrong))
    length, vocabulary = str(error.value).splitlines()
    assert length.startswith("data.seq_len (128)") and vocabulary.endswith("pass model.vocab_size=1024")
    with pytest.raises(ConfigError, match=r"data.mix.fr: .*choose from code, prose"):
        checked(composed_cfg(*small, "++data.mix.fr=1"))
    with pytest.raises(ConfigError, match=r"model.vocab_size \(many\) must be a number"):
        checked(composed_cfg(*small, "model.vocab_size=many"))


def test_vocabulary_is_the_datas(small: list[str], tmp_path: Path) -> None:
    choices = ["model=tiny", "data=local", "parallel.device=cpu"]
    prepared = next(option for option in small if option.startswith("data.path="))
    found = {
        "prepared": [*choices, prepared],  # a tokenizer of 1,000 pieces
        "not prepared": [*choices, f"data.path={tmp_path}", "data.vocab_size=5000"],
        "random": [*choices, "data=random", "data.vocab_size=300"],
        "stated": [*choices, prepared, "model.vocab_size=2000"],
        "quoted": [*choices, prepared, "model.vocab_size='2000'"],
    }
    sizes = {name: checked(composed_cfg(*options)).model.vocab_size for name, options in found.items()}
    assert sizes == {"prepared": 1024, "not prepared": 5120, "random": 384, "stated": 2000, "quoted": 2000}
    assert checked(composed_cfg("model=7b", "data=random", "parallel.device=cpu")).model.vocab_size == 103168


@pytest.mark.parametrize(("settings", "hint"), [([], True), (["precision.grad_dtype=fp32"], False)])
def test_sums_of_many_gradients_in_bf16_are_pointed_out(
    tmp_path: Path, small: list[str], settings: list[str], hint: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    trained(tmp_path / "run", *small, "precision=bf16", "steps=1", "global_batch_tokens=4160", *settings)
    assert ("precision.grad_dtype=fp32" in caplog.text) == hint
