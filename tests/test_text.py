"""Settings that are text are taken as they are typed."""

import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from conf.cli import CONF, CommandLine, as_hydra_reads, run
from conf.schema import register

register()

TYPED = [
    ("generate", "prompt", "It's"), ("generate", "prompt", "你好"), ("generate", "prompt", "Once upon a time, there was"),
    ("generate", "prompt", "cost ${price} of ${run} \\${x} \\"), ("generate", "prompt", "~/x"), ("generate", "prompt", " 1.10 "),
    ("generate", "prompt", "[a, {b: 'c'"), ("generate", "prompt", "choice(a,b)"), ("generate", "prompt", "line\nline\t"),
    ("generate", "prompt", "true"), ("generate", "run", "runs/a=[1],b='2'"), ("generate", "run", "1e3"),
    ("train", "name", "2024_11_25"), ("train", "data.path", "/data/中文 (a, b)"), ("train", "data.tokenizer", "a${b}"),
    ("train", "init_from", "007"), ("train", "logger.wandb_notes", "~/x: \"why\", who?"),
    ("prepare_data", "data.sources.web", "/d/it's, ${here}"), ("export", "out", "2e1/{x}"),
    ("prepare_data", "data.input", "2024_11_25"), ("prepare_data", "data.valid_input", "true"),
    ("prepare_data", "data.sources.web.input", "1.50"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "text"), TYPED)
def test_text_is_taken_as_it_is_typed(name: str, key: str, text: str) -> None:
    override = OverridesParser.create().parse_override(as_hydra_reads(f"{key}={text}", name, sweep=False))
    assert OmegaConf.create({"x": override.value()}).x == text and override.get_key_element().lstrip("+") == key


def as_read(name: str, *argv: str) -> DictConfig:
    line = CommandLine(get_args_parser().parse_args(argv), name)
    return line.configure(line.parser.parse_overrides(line.arguments))[0]


def test_text_that_hydra_still_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    cfg = as_read("generate", "prompt='a, ${b}'", "prompts=null", "hf=~/x", "stop=[1.10, 'a, b', ~/x, ${c}]")
    assert (cfg.prompt, cfg.prompts, cfg.hf) == ("a, ${b}", None, "/home/me/x")
    assert list(cfg.stop) == ["1.10", "a, b", "~/x", "${c}"]
    changes = ["checkpoint.accept_changes=[steps]", "steps=${seed}"]
    cfg = as_read("train", "name=lr_${optimizer.lr}", "skip_batches=[]", *changes)
    assert (cfg.name, cfg.skip_batches, cfg.checkpoint.accept_changes, cfg.steps) == ("lr_0.0001", [], ["steps"], 0)


def test_sweeps_over_text(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["data=local", "-m", 'data.path="a, b",/data/it\'s ,007', "skip_batches=[1,2],[3]", "name=x_${seed}"]
    typed += ["data.name=choice(a,b)", "data.seq_len=64", 'scheduler="wsd",cosine']
    monkeypatch.setattr(sys, "argv", ["train.py", *typed])
    monkeypatch.setattr("conf.cli.hydra_main", lambda **_: lambda _: lambda: None)
    run(lambda _: None, "train")
    assert sys.argv[1] == "-m", "Hydra wants its flags before the settings"
    (points,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(sys.argv[2:]), None)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfgs = [compose("train", overrides=point) for point in points[::5]]  # has every value of each
    assert len(points) == 3 * 2 * 2 * 2 and {cfg.name for cfg in cfgs} == {"x_0"}
    assert {cfg.data.path for cfg in cfgs} == {"a, b", "/data/it's", "007"}
    assert {tuple(cfg.skip_batches) for cfg in cfgs} == {("1", "2"), ("3",)}
    assert {cfg.scheduler.type.value for cfg in cfgs} == {"wsd", "cosine"}
