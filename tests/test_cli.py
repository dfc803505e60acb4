"""Every option composes, everything wrong with a command line is reported at once, and Hydra's own features work."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

from conf.cli import CONF, CommandLine, _exit_with, _print_errors, checked, run
from conf.schema import TrainConfig, free_keys, register, stored, stored_model, to_plain
from launch.config import RankError
from launch.sweep import folder_name
from tests.conftest import ROOT, composed_cfg, ran
from training.config import OptimizerConfig
from training.preflight import world_size

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name[0] != "_")
OPTIONS = {group: sorted(path.stem for path in (CONF / group).glob("*.yaml")) for group in GROUPS}
LINES = {"model": ("data", "precision", "dry_run"), "parallel": ("optimizer", "scheduler", "checkpoint", "logger"),
         "experiment": (), "launcher": ()}  # groups whose options are composed_cfg together  # fmt: skip

register()


def problems(*argv: str, command: str = "train") -> list[str]:
    return CommandLine(get_args_parser().parse_args(argv), command).problems()


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the user's own, outside the repository: an experiment, a model, and a group of its own."""
    folder = tmp_path_factory.mktemp("mine")
    files = {
        "experiment/mine": "# @package _global_\ndefaults:\n  - override /model: small\n  - override /data: random\n"
        "  - override /logger: none\n  - override /precision: fp32\n"
        "steps: 2\nglobal_batch_tokens: 64\nparallel: {device: cpu, threads: 1}\ncheckpoint: {every: 0}\n"
        "data: {seq_len: 16, vocab_size: 64, micro_batch_size: 4, workers: 0}\nvalid_tokens: 64\n",
        "experiment/broken": "# @package _global_\nmodel: {n_layrs: 3}\n",
        "model/small": "{name: small, vocab_size: 64, d_model: 16, n_layers: 1, n_heads: 2, n_kv_heads: 2, d_ff: 32, "
        "max_seq_len: 16}\n",
        "cluster/big": "# @package _global_\nsteps: 7\n",
        "my_train": "defaults: [train, _self_]\nsteps: 9\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.mark.parametrize("first", LINES)
def test_every_option_composes(first: str) -> None:
    groups = (first, *LINES[first])
    assert sorted(group for line in LINES for group in (line, *LINES[line])) == GROUPS
    more = {"model": ["data.seq_len=256", "data.input=tokens"], "parallel": ["model=1b", "parallel.device=cpu"]}
    for options in zip_longest(*(OPTIONS[group] for group in groups)):
        chosen = [f"{group}='{option}'" for group, option in zip(groups, options, strict=True) if option is not None]
        ranks = [f"parallel.nproc_per_node={1 if options[0] == 'single' else 8}"] if first == "parallel" else []
        origin = ["init_from=runs/done"] if options[0] == "sft_7b" else []
        assert checked(composed_cfg(*chosen, *more.get(first, []), *ranks, *origin)).name


def test_hyper_parameters_of_the_tutorial() -> None:
    config: TrainConfig = checked(composed_cfg("experiment=7b_pile_small"))
    model, data, optimizer, scheduler = config.model, config.data, config.optimizer, config.scheduler
    assert (model.n_layers, model.d_model, model.n_heads, model.d_ff) == (32, 4096, 32, 11008)
    assert (model.vocab_size, data.seq_len, data.pack_tokens, config.steps) == (103168, 2048, 4096, 50000)
    assert (optimizer.lr, optimizer.lr * scheduler.min_lr_ratio) == (1e-4, pytest.approx(1e-5))
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.01)
    assert (optimizer.max_grad_norm, scheduler.type.value, scheduler.warmup_ratio) == (1.0, "cosine", 0.01)
    assert config.grad_accum_steps(dp_size=8) == 4
    config = checked(composed_cfg("experiment=7b_pile_small_4_nodes"))
    assert (world_size(config), config.parallel.dp_shard, config.grad_accum_steps(dp_size=32)) == (32, 8, 1)
    assert config.launcher.time_s == 24 * 3600 and config.optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("modle=7b optimizer=null +experiment=demo 7b", [
            "7b must be key=value", "optimizer=null: .*string", r"\+experiment=demo: ", "modle .*mean model",
        ]),
        ("model=8b optimizer.lrr=1 +model.n_layer=3 steps=abc model.init=gpt steps.x=1 name=实验/第一", [  # all at once
            "model=8b: .* 7b ", "optimizer.lrr .*optimizer.lr", "steps=abc: .*Integer", "model.init=gpt: .*internlm_v1",
            "steps.x", "model.n_layer .*'n_layers'",
        ]),
        ("hydra.run.dir=s3://bucket/run", [r"hydra.run.dir \(s3://bucket/run\) must be a folder"]),
        ("lr=1e-3 batch_size=8 model.resume=x", [
            "lr .*optimizer.lr", "batch_size .*global_batch_tokens", "model.resume .*checkpoint.resume",
        ]),
        ("data.mix.code=0.5 data=local data.seq_len=256", []),  # training does not ask for the text
        ("data.mix.笔记=1 data.sources.C#=x", ["data.mix.笔记=1 .*YAML", "data.sources.C#=x "]),
        ("optimizer.lr=1e-4,1e-3", ["optimizer.lr .*-m"]),
        ("launcher=slurm optimizer.lr=1e-3,-1", [r"optimizer.lr \(-1.0\) .*\(at optimizer.lr=-1\)"]),
        ("-m seed=range(3) optimizer.lr=-1,1", [r"optimizer.lr .*\(at seed=0 optimizer.lr=-1 and 2 more\)"]),
        ("samples.prompts=The", [r"samples.prompts \(The\) must be a list, such as \[The\]"]),
        ("-m model=tiny,8b optimizer.lr=1,x", ["model=8b: ", "optimizer.lr=x: "]),
        ("experiment=lr_sweep optimizer.lr=1,-1", [r"optimizer.lr .*\(at optimizer.lr=-1\)"]),
        ("experiment=lr_sweep steps=0", [r"steps \(0\) must be at least 1$"]),
        ("-m hydra/sweeper=optuna hydra.sweeper.n_trails=9 optimizer.lr=1,2", ["hydra.sweeper.n_trails"]),
        ("-m hydra/sweeper=optuna optimizer.lr=tag(log,interval(1e-4,1e-2))", []),
        ("-m hydra/sweeper=optuna optimizer.lr=interval(-1,1)", [r"optimizer.lr \(-1.0\)"]),
        ("-m hydra/launcher=nothing steps=1", ["hydra/launcher=nothing: .*jobs"]),
        ("experiment=sft_7b data.input=a.json", ["init_from is not set"]),
        ("name=../x skip_batches=[2,3-1] steps=0 init_content=[weights] init_from=x model.n_heads=7 early_stop.margin=0 "
         "optimizer.lr=nan checkpoint.keep_best=true valid_every=30 checkpoint.keep_every=1500 data.seq_len=4096 "
         "data.micro_batch_size=1", [
            r"name \(../x\)", r"steps \(0\)", r"model.d_model \(256\)", r"model.n_kv_heads \(4\)",
            r"optimizer.lr \(nan\)", r"checkpoint.keep_every \(1500\) .*checkpoint.every \(1000\)",
            r"early_stop.margin \(0.0\)", r"skip_batches \(2,3-1\)", r"init_content \(weights\)",
            r"data.seq_len \(4096\).*model.max_seq_len \(2048\)", r"keep_best .*valid_every \(30\)",
        ]),
        ("model.attention=flash_attn precision=fp32", [r"model.attention \(flash_attn\) .*precision.compute"]),
        ("parallel.cuda_graphs=true precision=fp16 optimizer.impl=torch", ["precision.compute", "optimizer.impl .*torch"]),
        ("ramp.start_tokens=100 data.pack_len=300", [
            r"data.pack_len \(300\)", "ramp.every_steps", r"ramp.start_tokens \(100\)", r"ramp.increment_tokens \(0\)",
        ]),
        ("data.micro_batch_size=5 parallel.tp=3 parallel.nproc_per_node=3 parallel.device=cpu", [
            r"global_batch_tokens \(16384\) .*data.micro_batch_size \(5\)", r"parallel.tp \(3\) .*model.n_heads",
            r"parallel.cp x parallel.tp \(3\)",
        ]),
        ("launcher.nodes=2 launcher.partition=gpu launcher.time=0:01:00 launcher.parallel_jobs=0", [
            r"launcher.parallel_jobs \(0\)", "launcher.signal_delay_s", r"launcher.nodes \(2\)",
            r"launcher.partition \(gpu\)",
        ]),
        ("evaluate.every=5 samples.every=6", [r"evaluate.every \(5\) .*tasks", r"samples.every \(6\) .*prompts"]),
        ("optimizer=muon model.parametrization=mup", [r"optimizer.scale \(match_rms_adamw\) .*parametrization \(mup\)"]),
        ("objective=valid/losss early_stop.metric=-evaluation/x/acc evaluate.tasks=[/a/y.jsonl] samples.temperature=-1 "
         "early_stop.margin=1 profile=true steps=6 data.seq_len=64", [
            r"samples.temperature \(-1.0\)", r"objective \(valid/losss\)", r"early_stop.metric \(-evaluation/x/acc\)",
            r"early_stop.after_step \(100\)", r"profile \(true\)",
        ]),
        ("objective=evaluation/y/bpb evaluate.tasks=[/a/y.jsonl.gz] early_stop.metric=valid/loss/zh", []),
        ("objective=evaluation/y/bbp evaluate.tasks=[y.jsonl]", [r"objective \(evaluation/y/bbp\) .*evaluation/TASK/SCORE"]),
        ("launcher.time=1h", [r"launcher.time \(1h\)"]),
    ],
)  # fmt: skip
def test_everything_wrong_is_reported_at_once(line: str, expected: list[str]) -> None:
    """Cases 21 and 48."""
    found = problems(*line.split())
    assert len(found) == len(expected), found
    for pattern, problem in zip(expected, found, strict=True):
        assert re.search(pattern, problem), f"{pattern} is not in {problem}"


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        ("prepare_data", "data=local", ["data.input"]),
        ("prepare_data", "data=local data.sources.a={input:x,text_kye:y}", ["data.sources.a.text_kye: "]),
        ("prepare_data", "data=local data.sources.a={input:x,text_lines:7y}", ["data.sources.a.text_lines: Value '7y'"]),
        ("prepare_data", "data=local data.sources.a={text_key:y}", ["data.sources.a.input: "]),
        ("export", "", ["run, from_hf and from_internlm"]),
        ("export", "dtype=bf17 run=x", ["dtype=bf17"]),
        ("export", "from_internlm=/nowhere", ["/nowhere has no model_config.pt"]),
        ("generate", "", ["run and hf", "prompt and prompts"]),
        ("generate", "run=/nowhere prompt=x stop=end", ["stop (end) must be a list, such as [end]"]),
        ("generate", "hf=/nowhere prompt=x dtype=auto", ["dtype (auto)", "/nowhere has no config.json"]),
    ],
)  # fmt: skip
def test_other_commands_are_checked_too(name: str, line: str, expected: list[str]) -> None:
    found = problems(*line.split(), command=name)
    assert len(found) == len(expected), found
    assert all(part in problem for part, problem in zip(expected, found, strict=True)), found


def test_model_without_tokenizer_is_refused_for_generation(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    for argv, folder in ((f"run={tmp_path}", tmp_path / "tokenizer"), (f"hf={tmp_path / 'hf'}", tmp_path / "hf")):
        (problem,) = problems(argv, "prompt=x", command="generate")
        assert str(folder) in problem and "tokenizer" in problem
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_text("{}")
        assert problems(argv, "prompt=x", command="generate") == []


def test_checked_points_are_what_hydra_composes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("conf.cli.checked", lambda cfg: seen.append(OmegaConf.to_container(cfg, resolve=True)))
    lines = ("++data.mix.code=1,2", "model=tiny,125m", "name=x_${seed},b", "seed=3")
    assert problems("-m", *lines, "data.seq_len=${model.max_seq_len}") == []
    points = list(product((1, 2), ("tiny", "125m"), ("x_3", "b")))
    for cfg, (mix, model, name) in zip(seen, points, strict=True):
        overrides = [f"++data.mix.code={mix}", f"model={model}", f"name={name}", "seed=3"]
        whole = composed_cfg(*overrides, "data.seq_len=${model.max_seq_len}")
        assert cfg == OmegaConf.to_container(whole, resolve=True)


def test_first_rank_reports_errors_of_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "x"}
    for name, value in {**ranks, "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("launch.environment.visible_gpus", lambda: 2)
    assert any("without torchrun" in problem for problem in problems("-m", "seed=1,2", "parallel=ddp"))
    for argv, reported in (
        (["parallel=ddp"], "error: LOCAL_WORLD_SIZE (4) "),
        (["parallel=ddp", "optimizer.lr=-1", "parallel.device=cpu"], ""),
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        with pytest.raises(SystemExit, match="2"):
            run(lambda _: None, "train")
        printed = capsys.readouterr().err
        assert printed.startswith(reported) and bool(printed) == bool(reported)


def test_stored_configuration_is_json_and_has_every_key() -> None:
    odd = [
        "name=x",
        "data.path=missing",
        "optimizer.max_grad_norm=inf",
        "++optimizer.options={a: -inf, b: nan}",
        "model.name='a\\${b}'",
    ]
    plain = to_plain(checked(composed_cfg("precision=fp16", "+data.mix={a: 1, b: 2.5}", "skip_batches=[3]", *odd)))
    assert json.loads(json.dumps(plain)) == plain and plain["optimizer"]["options"] == {"a": "-inf", "b": "nan"}
    assert plain["data"]["mix"] == {"a": 1.0, "b": 2.5} and plain["skip_batches"] == ["3"]
    assert plain["precision"]["compute"] == "fp16" and plain["parallel"]["pipeline_schedule"] == "1f1b"
    assert set(plain) == set(TrainConfig.__dataclass_fields__)
    assert stored_model(plain).name == "a${b}" and stored(OptimizerConfig, plain["optimizer"]).max_grad_norm == math.inf


def test_folders_of_points_lie_in_the_sweeps() -> None:
    assert folder_name("optimizer.lr=0.001,skip_batches=[5]") == "optimizer.lr=0.001,skip_batches=[5]"
    assert folder_name("data.name='1.10'") == "data.name=1.10"
    assert folder_name("++data.mix.c++=1,++data.mix.b=2") == "data.mix.c++=1,data.mix.b=2"
    long = [f"skip_batches=[{'7,' * 200}{i}]" for i in range(2)]
    paths = ["init_from=runs/a", "init_from=runs_a", "init_from=../../a", "data.path='/数据/" + "长" * 90 + "'", *long]
    names = [folder_name(path) for path in paths]
    assert len(set(names)) == len(paths) and not any("/" in name or len(os.fsencode(name)) > 255 for name in names)
    assert folder_name("init_from='runs/a'") == names[0], "however it was quoted"


@pytest.mark.parametrize("script", ["train.py", "prepare_data.py"])
def test_an_interrupt_while_modules_load_is_quiet(script: str) -> None:
    argv = [sys.executable, "-X", "importtime", script, "nonsense"]
    with subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and any(" hydra._internal\n" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        rest = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.returncode in (-signal.SIGINT, 130) and not rest


def test_free_keys_decide_nothing_that_is_learnt() -> None:
    free = set(free_keys())
    assert {"name", "parallel", "launcher", "checkpoint", "valid_every", "data.workers", "data.path"} <= free
    assert {"data.source", "data.vocab_size", "data.split_by", "model.name"} <= free
    learnt = {"seed", "steps", "optimizer", "data.seq_len", "data.packing", "data.mix", "data.seed"}
    assert not free & {*learnt, "model", "model.d_model", "model.embed_grad_scale", "scheduler", "loss", "precision"}


# Hydra's own features


def test_folder_outside_the_repository_is_checked_like_ours(outside: Path) -> None:
    for folder in ([f"--config-dir={outside}"], [f"hydra.searchpath=[file://{outside}]"]):
        assert problems(*folder, "experiment=mine", "+cluster=big", "model=small") == []
        found = problems(*folder, "experiment=min", "+cluster=bg", "model.d_modl=3")
        assert len(found) == 3 and " mine " in found[0] and " big" in found[1] and "model.d_model" in found[2]
        (problem,) = problems(*folder, "experiment=broken")
        assert "experiment/broken" in problem and "n_layrs" in problem
    both = [f"--config-dir={outside / 'experiment'}", f"hydra.searchpath=[file://{outside}]"]
    assert problems(*both, "experiment=mine") == []
    assert "nowhere" in problems("--config-dir=nowhere")[0]
    assert problems(f"--config-dir={outside}", "--config-name=my_train", "stps=3")[0].startswith("stps ")


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("hydra.searchpath=[file://{outside}] experiment=mine --cfg job --package model", "d_model: 16\n"),
        ("--config-dir {outside} --config-name my_train --cfg job", "steps: 9\n"),
        ("--config-path {outside}/../conf --config-dir conf --cfg job", ""),
        ("--config-dir {outside} --info searchpath", "{outside}"),
        ("--hydra-help", "--multirun"),
        ("--config-dir {outside} --help", "\ncluster: big\n"),
    ],
)
def test_hydra_flags_work(outside: Path, line: str, shown: str) -> None:
    code = 2 if "--config-path" in line else 0
    done = ran("train.py", *line.format(outside=outside).split(), code=code)
    assert shown.format(outside=outside) in done.stdout and done.stderr.startswith("error: ") == (code == 2)


def test_completion_knows_options_and_keys() -> None:
    for typed, word in (("experiment=d", "experiment=demo"), ("optimizer.l", "optimizer.lr=")):
        variables: Any = {"COMP_LINE": f"python train.py {typed}", "COMP_POINT": "99", "COMP_TYPE": "9"}
        assert word in ran("train.py", "-sc", "query=bash", **variables).stdout


def test_remedy_names_the_folder_of_the_user(outside: Path, tmp_path: Path) -> None:
    settings = ["experiment=mine", "data=builtin", f"data.path={tmp_path / 'no'}", f"hydra.run.dir={tmp_path}/a/b"]
    done = ran("train.py", f"--config-dir={outside}", *settings, code=1)
    assert not (tmp_path / "a").exists(), "a refused run has no folder"
    remedy = f"python prepare_data.py --config-dir={outside} data=builtin data.path={tmp_path / 'no'}\n"
    assert done.stderr.endswith(remedy)


no_joblib = find_spec("hydra_plugins.hydra_joblib_launcher") is None
JOBLIB = pytest.param("joblib", marks=pytest.mark.skipif(no_joblib, reason="hydra-joblib-launcher is not installed"))


def test_stock_launcher_checks_every_point(tmp_path: Path, outside: Path) -> None:
    argv = ["train.py", "-m", f"--config-dir={outside}", "experiment=mine", "hydra/launcher=basic"]
    argv += ["optimizer.lr=1e-3,1e-2", f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=${optimizer.lr}"]
    done = ran(*argv, "data=builtin", "data.path=/nowhere", code=1)
    assert "/nowhere" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("*/metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", JOBLIB, "submitit_local"])
def test_stock_launcher_trains_every_point(tmp_path: Path, outside: Path, launcher: str) -> None:
    argv = ["train.py", "-m", f"--config-dir={outside}", "experiment=mine", f"hydra/launcher={launcher}"]
    many = ["data.workers=2", *(f"launcher.sbatch.option{n}={'x' * 20}" for n in range(9))]  # a long name
    ran(*argv, *many, "launcher.where=slurm", "optimizer.lr=1e-3,1e-2", f"hydra.sweep.dir={tmp_path}")
    states = [json.loads(path.read_text())["state"] for path in tmp_path.glob("*/status.json")]
    assert states == ["finished"] * 2


@pytest.mark.parametrize(
    ("line", "code", "expected"),
    [
        ("train.py steps=-1", 2, "steps (-1)"),
        ("train.py data.path=nowhere", 1, "run: python prepare_data.py data=builtin data.path=nowhere\n"),
        ("train.py model=125m data=tokens data.input=Makefile data.tokenizer=/no/x.model", 1, "data.tokenizer (/no/x"),
        ("prepare_data.py data=local data.input=/nowhere data.path={tmp}/tokens", 1, "data.input (/nowhere)"),
        ("generate.py run=/nowhere prompt=x", 2, "/nowhere"),
    ],
)
def test_refusal_does_not_import_torch(tmp_path: Path, line: str, code: int, expected: str) -> None:
    done = ran("-X", "importtime", *line.format(tmp=tmp_path).split(), f"hydra.run.dir={tmp_path}", code=code)
    assert expected in done.stderr and " torch\n" not in done.stderr


def test_secrets_are_not_echoed(capsys: pytest.CaptureFixture[str]) -> None:
    _print_errors(["data.input (https://me:secret@host/a.jsonl) has \x1b[2J", "https://host:80/a@b is as it was"])
    with pytest.raises(SystemExit):
        _exit_with(RankError("of rank 1: alerts.webhook (x://host/a?b=secret) is wrong"))
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == r"error: data.input (https://me:***@host/a.jsonl) has \x1b[2J"
    assert second == "error: https://host:80/a@b is as it was"
    assert third == "of rank 1: alerts.webhook (x://host/***) is wrong"
