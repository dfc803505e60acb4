"""Every option composes; every wrong command line is told in sentences, all of them at once."""

import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from conf.cli import CONF, command_line_problems, run
from conf.schema import ConfigError, TrainConfig, parse_ranges, register, to_config

ROOT = Path(__file__).parent.parent
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name[0] != "_")
OPTIONS = [(group, option.stem) for group in GROUPS for option in sorted((CONF / group).glob("*.yaml"))]

register()


def composed(*overrides: str, config_name: str = "train") -> TrainConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_config(compose(config_name, overrides=list(overrides)))


def told(*argv: str, config_name: str = "train") -> list[str]:
    return list(command_line_problems(list(argv), config_name))


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group_composes(group: str, option: str) -> None:
    extra = ["data.seq_len=256", "data.input=tokens"] if group == "data" else []
    extra += ["init_from=runs/done"] if option == "sft_7b" else []
    ranks = 1 if option == "single" else 8
    extra += ["model=1b", "parallel.device=cpu", f"parallel.nproc_per_node={ranks}"] if group == "parallel" else []
    assert composed(f"{group}='{option}'", *extra).name


def test_the_groups_are_those_the_readme_names() -> None:
    named = "model data parallel optimizer scheduler precision checkpoint logger launcher experiment dry_run"
    assert sorted(named.split()) == GROUPS


def test_model_and_data_name_the_run() -> None:
    assert composed("model=7b", "data=pile_small").name == "7b_pile_small"


def test_the_tutorial_experiment_has_the_tutorials_hyper_parameters() -> None:
    config = composed("experiment=7b_pile_small")
    model, data, optimizer, scheduler = config.model, config.data, config.optimizer, config.scheduler
    assert (model.n_layers, model.d_model, model.n_heads, model.d_ff) == (32, 4096, 32, 11008)
    assert (model.vocab_size, data.seq_len, data.pack_tokens, config.steps) == (103168, 2048, 4096, 50000)
    assert (optimizer.lr, optimizer.lr * scheduler.min_lr_ratio) == (1e-4, pytest.approx(1e-5))
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.max_grad_norm) == (
        0.9,
        0.95,
        0.01,
        1.0,
    )
    assert (scheduler.type.value, scheduler.warmup_ratio) == ("cosine", 0.01)
    assert config.grad_accum_steps(dp_size=8) == 4


@pytest.mark.parametrize(
    ("argv", "sentences"),
    [
        (["model=7bb"], ["model=7bb: there is no such option; did you mean '7b'?"]),
        (["modle=7b"], ["modle is not a setting; did you mean 'model'?"]),
        (
            ["optimizer.lrr=1", "+model.n_layer=3", "steps=abc"],
            [
                "optimizer.lrr is not a setting; did you mean 'lr'?",
                "model.n_layer is not a setting; did you mean 'n_layers'?",
                "steps (abc): Value 'abc' of type 'str' could not be converted to Integer",
            ],
        ),
        (["optimizer=null"], ["optimizer=null: this group needs an option; choose from adamw"]),
        (["optimizer.lr=1e-4,1e-3"], ["optimizer.lr has several values; add -m to run one after another"]),
        (
            ["model.init=gpt"],
            ["model.init (gpt): Invalid value 'gpt', expected one of [internlm, internlm_v1, llama]"],
        ),
        (["optimizer.lr=nan"], ["optimizer.lr (nan) must be positive and finite"]),
        (
            ["model.n_heads=7", "data.seq_len=1024", "data.micro_batch_size=1"],
            [
                "model.d_model (256) must be divisible by model.n_heads (7)",
                "model.n_heads (7) must be divisible by model.n_kv_heads (4)",
                "data.seq_len (1024) must be at most model.max_seq_len (512); shorten the one or raise the other",
            ],
        ),
        (
            ["-m", "steps=10,0"],
            ["steps (0) must be at least 1 (at steps=0)"],
        ),
        (
            ["launcher=slurm", "optimizer.lr=1e-3,-1"],
            ["optimizer.lr (-1.0) must be positive and finite (at optimizer.lr=-1)"],
        ),
        (
            ["experiment=sft_7b", "data.input=a.json"],
            ["init_from is not set; name a run, a checkpoint, or a Hugging Face folder to begin from"],
        ),
        (["skip_batches=3"], ["skip_batches (3) must be a list, as in skip_batches=[3]"]),
        (["7b", "foo"], ["7b is no key=value; did you mean model=7b?", "foo is no key=value"]),
        (["local"], ["local is no key=value; did you mean data=local or launcher=local?"]),
        (["+experiment=demo"], ["+experiment=demo: leave out the +, as in experiment=demo"]),
        (["skip_batches=[2,3-1]"], ["skip_batches (2,3-1) must look like [17,100-120]"]),
        (["skip_batches=[0]"], ["skip_batches (0) must look like [17,100-120]"]),
        (
            ["name=../x"],
            ["name (../x) must be letters, digits and ._=,+- (and / between folders), because it names runs/<name>"],
        ),
        (
            ["init_content=[weights]", "init_from=x"],
            ["init_content (weights) must be among model, optimizer, scheduler, sampler, all"],
        ),
        (
            ["model.attention=flash_attn", "precision=fp32"],
            [
                "model.attention (flash_attn) needs precision.compute bf16 or fp16, not fp32; model.attention=sdpa computes in fp32"
            ],
        ),
        (
            ["parallel.cuda_graphs=true", "precision=fp16", "optimizer.impl=torch"],
            [
                "parallel.cuda_graphs (true) needs precision.compute bf16 or fp32, not fp16, whose loss scale the host sets; choose parallel.cuda_graphs=false",
                "parallel.cuda_graphs (true) needs optimizer.impl auto or triton, not torch, which takes its rates from the host; choose parallel.cuda_graphs=false",
            ],
        ),
        (
            ["ramp.start_tokens=100"],
            [
                "ramp.every_steps (0) and ramp.increment_tokens (0) must be at least 1 when ramp.start_tokens is set",
                "ramp.start_tokens (100) must be a positive multiple of a micro-batch (2048 tokens)",
                "ramp.increment_tokens (0) must be a positive multiple of a micro-batch (2048 tokens)",
            ],
        ),
        (
            [
                "data.micro_batch_size=5",
                "parallel.tp=3",
                "parallel.nproc_per_node=3",
                "parallel.device=cpu",
                "parallel.sequence_parallel=false",
            ],
            [
                "global_batch_tokens (16384) must be a positive multiple of data.micro_batch_size (5) x data.seq_len (256) = 1280",
                "parallel.tp (3) must divide model.n_heads (4), model.n_kv_heads (4), model.d_ff (704), model.vocab_size (4096); choose from 1, 2, 4",
            ],
        ),
        (["data.pack_len=300"], ["data.pack_len (300) must be a multiple of data.seq_len (256)"]),
    ],
)
def test_a_wrong_command_line_is_told_in_full(argv: list[str], sentences: list[str]) -> None:
    assert told(*argv) == sentences


def test_a_point_is_asked_for_once() -> None:
    assert told("-m", "optimizer.lr=1e-3,2,0.001") == ["optimizer.lr=0.001 is asked for 2 times; name each value once"]
    assert told("-m", "optimizer.lr=1,2", "hydra.sweep.subdir=${hydra.job.num}") == []


def test_a_sweep_that_the_configuration_names_is_checked_like_one_that_is_typed() -> None:
    assert told("experiment=lr_sweep", "optimizer.lr=1,-1") == [
        "optimizer.lr (-1.0) must be positive and finite (at optimizer.lr=-1)"
    ]
    assert told("experiment=lr_sweep", "steps=0") == ["steps (0) must be at least 1"], "at every point, said once"


def test_points_that_share_their_groups_are_what_hydra_composes(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    monkeypatch.setattr("conf.cli.to_config", lambda cfg: checked.append(cfg) or to_config(cfg))
    values = ("+data.mix.code=1,2", "model=tiny,125m", "name=a,b", "seed=3")
    assert told("-m", *values, "data.seq_len=${model.max_seq_len}", "data.micro_batch_size=1") == []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for cfg, (mix, model, name) in zip(checked, product((1, 2), ("tiny", "125m"), "ab"), strict=True):
            overrides = [f"+data.mix.code={mix}", f"model={model}", f"name={name}", "seed=3"]
            overrides += ["data.seq_len=${model.max_seq_len}", "data.micro_batch_size=1"]
            assert cfg == compose("train", overrides=overrides)


def test_a_large_sweep_with_a_bad_point_is_composed_once_and_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    composing = []  # a tenth of a second each
    monkeypatch.setattr("conf.cli.compose", lambda *args, **kwargs: composing.append(1) or compose(*args, **kwargs))
    assert told("-m", "seed=range(20)", "optimizer.lr=1,-1") == [
        "optimizer.lr (-1.0) must be positive and finite (at seed=0 optimizer.lr=-1 and 19 other points)"
    ]
    assert len(composing) == 1


def test_a_setting_that_a_launcher_or_a_search_does_not_have_is_told_once() -> None:
    assert told("-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trails=9", "optimizer.lr=1,2") == [
        "hydra.sweeper.n_trails: Key 'n_trails' not in 'SearchConf'"
    ]


def test_a_search_is_checked_at_the_corners_of_its_space() -> None:
    assert told("-m", "hydra/sweeper=optuna", "optimizer.lr=tag(log, interval(1e-4, 1e-2))") == []
    (sentence,) = told("-m", "hydra/sweeper=optuna", "optimizer.lr=interval(-1, 1)")
    assert sentence == "optimizer.lr (-1.0) must be positive and finite (at optimizer.lr=-1.0)"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["launcher.nodes=2"], "launcher.nodes (2) must be 1 with launcher=local; launcher=slurm has more"),
        (
            ["launcher.partition=gpu"],
            "launcher.partition (gpu) is for launcher=slurm; pass that too, or leave it out",
        ),
        (["launcher.time=1h"], "launcher.time (1h) must look like 24:00:00 or 2-12:00:00 (days-hours:minutes:seconds)"),
        (["launcher.time=0:01:00"], "launcher.signal_delay_s (120) must be less than launcher.time (0:01:00)"),
        (["launcher.parallel_jobs=0"], "launcher.parallel_jobs (0) must be at least 1"),
        (["early_stop.margin=0"], "early_stop.margin (0.0) must be positive, or null for no early stop"),
    ],
)
def test_a_wrong_launcher_or_rule_is_told(argv: list[str], sentence: str) -> None:
    assert told(*argv) == [sentence]


def test_without_slurm_a_job_for_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    (sentence,) = told("launcher=slurm")
    assert sentence == "launcher=slurm: there is no sbatch on this machine; log in where jobs are submitted"


def test_a_launcher_or_a_search_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    (sentence,) = told("-m", "hydra/launcher=joblib", "steps=1")
    assert sentence.startswith("hydra/launcher=joblib is not installed; choose from basic, jobs, ")
    monkeypatch.setattr("conf.cli.find_spec", lambda _: None)
    assert told("-m", "steps=1,2") == ["launcher=local needs submitit: python -m pip install -r requirements.txt"]
    assert told("-m", "hydra/sweeper=optuna", "optimizer.lr=interval(1e-4, 1e-2)") == [
        "hydra/sweeper=optuna needs Optuna: python -m pip install -r requirements-search.txt"
    ]


def test_a_sweep_is_not_started_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**ranks, "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    (sentence,) = told("-m", "optimizer.lr=1,2", "parallel=ddp")
    assert sentence == "a sweep starts its ranks itself: python train.py -m ..., without torchrun or srun"


def test_a_rank_says_what_is_wrong_with_its_own_variables_and_the_first_says_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "x"}
    for name, value in {**ranks, "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("launch.environment.visible_gpus", lambda: 2)
    for argv, told in (
        (["parallel=ddp"], "error: LOCAL_WORLD_SIZE (4) ranks were started on a machine with 2 GPUs; "),
        (["parallel=ddp", "optimizer.lr=-1", "parallel.device=cpu"], ""),
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        with pytest.raises(SystemExit, match="2"):
            run(lambda: None, "train")
        said = capsys.readouterr().err
        assert said.startswith(told) and bool(said) == bool(told)


def test_the_tutorials_run_on_four_nodes_is_one_micro_batch_a_gpu() -> None:
    config = composed("experiment=7b_pile_small_4_nodes")
    assert (config.world_size, config.parallel.dp_shard, config.grad_accum_steps(dp_size=32)) == (32, 8, 1)
    assert config.launcher.time_s == 24 * 3600 and config.optimizer.lr == 1e-4


def test_a_value_that_hydra_cannot_read_is_told_with_the_way_out() -> None:
    (sentence,) = told("run=x", "prompt=def main(", config_name="generate")
    assert sentence.startswith("the command line cannot be read: ") and sentence.endswith("""as in 'key="a (b), c"'""")


def test_a_value_where_a_list_belongs_is_told() -> None:
    assert told("run=x", "prompt=x", "stop=end", config_name="generate") == [
        "stop (end) must be a list, as in stop=[end]"
    ]


def test_preparing_asks_for_the_text_and_training_does_not() -> None:
    assert told("data=local", config_name="prepare_data") == [
        "data.input is not set; name a file, a folder or a glob, such as data.input='texts/*.jsonl.gz'"
    ]
    assert told("data=local", "data.seq_len=256") == []


def test_generate_and_export_want_exactly_one_source() -> None:
    assert told(config_name="export")[0].startswith("run and from_hf: set one of them")
    assert [line.split(":")[0] for line in told(config_name="generate")] == [
        "run and hf",
        "prompt and prompts",
    ]


@pytest.mark.parametrize(
    "argv", [["export.py", "run"], ["export.py", "from_hf"], ["generate.py", "run"], ["generate.py", "hf"]]
)
def test_a_model_that_is_not_there_is_told_without_torch(argv: list[str]) -> None:
    command, key = argv
    prompt = ["prompt=x"] if command == "generate.py" else []
    argv = [sys.executable, "-X", "importtime", command, f"{key}=/nowhere", *prompt]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and " torch\n" not in done.stderr, done.stderr
    holds = "checkpoint" if key == "run" else "config.json"
    assert f"error: {key} (/nowhere) holds no {holds}; name a " in done.stderr


def test_a_model_of_tokens_alone_is_told_to_have_no_text(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    for argv, folder in ((f"run={tmp_path}", tmp_path / "tokenizer"), (f"hf={tmp_path / 'hf'}", tmp_path / "hf")):
        (sentence,) = told(argv, "prompt=x", config_name="generate")
        assert sentence.startswith(
            f"{folder} holds no tokenizer, without which there is no text; put the tokenizer.model"
        )
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_text("{}")
        assert told(argv, "prompt=x", config_name="generate") == []


def test_a_section_error_names_every_key_and_value() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_tokens \(1000\) must be a positive multiple"):
        composed("global_batch_tokens=1000")


def test_the_ramp_grows_by_its_increment_and_stops_at_the_full_batch() -> None:
    config = composed("ramp.start_tokens=4096", "ramp.increment_tokens=4096", "ramp.every_steps=10")
    sizes = [config.packs_of_step(step) * config.data.pack_tokens for step in (0, 9, 10, 29, 30, 500)]
    assert sizes == [4096, 4096, 8192, 12288, 16384, 16384]


def test_skip_batches_are_ranges_with_both_ends() -> None:
    assert parse_ranges(["1-3", "9"]) == [range(1, 4), range(9, 10)]
    assert parse_ranges([]) == []


@pytest.mark.parametrize(
    ("argv", "code", "sentence"),
    [
        ("train.py --help", 0, ""),
        ("train.py --cfg job", 0, ""),
        ("train.py steps=-1", 2, "steps (-1) must be"),
        (
            "train.py data.path=nowhere",
            1,
            "there is no prepared data in nowhere; run: python prepare_data.py data=builtin data.path=nowhere\n",
        ),
        (
            "train.py experiment=7b_pile_small data.name=x",
            1,
            "there is no prepared data in corpora/x; run: python prepare_data.py data=pile_small data.name=x\n",
        ),
        (
            "train.py model=125m data=tokens data.input=/nowhere",
            1,
            "data.input (/nowhere) is no folder with .bin files",
        ),
        (
            "train.py model=125m data=tokens data.input=Makefile data.valid_input=/nowhere",
            1,
            "data.valid_input (/nowhere) is no folder with .bin files",
        ),
        (
            "train.py model=125m data=tokens data.input=Makefile data.tokenizer=/nowhere/x.model",
            1,
            "data.tokenizer (/nowhere/x.model) does not exist; name a .model",
        ),
        (
            "train.py data=random data.seq_len=256 data.vocab_size=4096 data.micro_batch_size=1 init_from=/nowhere",
            1,
            "init_from (/nowhere) is no folder; name a run",
        ),
        (
            "train.py data=random data.seq_len=256 data.vocab_size=4096 data.micro_batch_size=1 init_from=docs",
            1,
            "init_from (docs) holds neither a checkpoint nor a config.json; name a run",
        ),
        ("prepare_data.py data=locl", 2, "did you mean 'local'?"),
        ("prepare_data.py data=local data.input=/nowhere", 1, "data.input (/nowhere) names no file"),
        ("export.py dtype=bf17 run=x", 2, "dtype (bf17)"),
    ],
)
def test_a_command_answers_without_torch(tmp_path: Path, argv: str, code: int, sentence: str) -> None:
    folders = [f"hydra.run.dir={tmp_path}"]
    folders += [f"data.path={tmp_path / 'tokens'}"] if argv.startswith("prepare_data") else []
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *argv.split(), *folders], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code and sentence in done.stderr and "Traceback" not in done.stderr
    assert " torch\n" not in done.stderr, "torch was imported to say no"
    assert "documents/s" not in done.stderr, "a progress bar was shown of nothing"
