"""A prepared corpus is opened for training, or it is said why not."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from conf import cli as command
from conf.cli import CONF
from conf.schema import to_config
from corpus.config import DataError
from data.config import DataConfig, Packing
from data.dataset import Corpus, open_corpus
from data.tokenizer import Tokenizer
from tests.corpora import lines, made


def tampered(config: DataConfig, change: str) -> None:
    folder = Path(config.path)
    match change:
        case "tokenizer":
            path = folder / "tokenizer" / "tokenizer.model"
            path.write_bytes(path.read_bytes() + b"\xc0\x3e\x01")
        case "corpus.json":
            (folder / "corpus.json").write_text("{}")
        case "bin":
            path = next((folder / "train").glob("*.bin"))
            path.write_bytes(path.read_bytes()[:-2])
        case "header's tokenizer" | "header's max_token":
            path = next((folder / "train").glob("*.json"))
            other = {"tokenizer": "other"} if change.endswith("tokenizer") else {"max_token": 1200}
            path.write_text(json.dumps(json.loads(path.read_text()) | other))


@pytest.mark.parametrize(
    ("change", "vocab_size", "sentence"),
    [
        ("none", 1199, r"has 1200 pieces, more than model.vocab_size \(1199\); pass model.vocab_size=1280"),
        ("tokenizer", 1200, "is not the tokenizer that .* was made with"),
        ("corpus.json", 1200, "does not describe a corpus"),
        ("bin", 1200, "it was cut short or changed; prepare the corpus again"),
        ("header's tokenizer", 1200, "was written with another tokenizer than .*; prepare the corpus again"),
        ("header's max_token", 1200, r"outside model.vocab_size \(1200\); prepare the corpus again"),
    ],
)
def test_an_unfit_corpus_is_told_when_opened(
    config: DataConfig, tokenizer: Tokenizer, change: str, vocab_size: int, sentence: str
) -> None:
    made(config, tokenizer)
    tampered(config, change)
    with pytest.raises(DataError, match=sentence):
        open_corpus(config, vocab_size=vocab_size)


def test_missing_and_too_little_data_are_told(config: DataConfig, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="run: python prepare_data.py with the same data settings"):
        open_corpus(config, vocab_size=1200)
    made(config, tokenizer)
    with pytest.raises(DataError, match=r"none of its sources fills one pack of 100000"):
        open_corpus(dataclasses.replace(config, seq_len=100_000, packing=Packing.internlm), vocab_size=1200)
    with pytest.raises(DataError, match=r"data.mix.en: there is no such source; choose from c\+\+, wikipedia_en"):
        open_corpus(dataclasses.replace(config, mix={"en": 1.0}), vocab_size=1200)


def test_a_changed_corpus_has_another_fingerprint(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    made(config, tokenizer)
    before = open_corpus(config, vocab_size=1200).fingerprint
    assert open_corpus(config, vocab_size=1200).fingerprint == before
    shutil.rmtree(config.path)
    (tmp_path / "texts" / "b.jsonl").write_bytes(lines([{"text": "more text"}]))
    made(config, tokenizer)
    assert open_corpus(config, vocab_size=1200).fingerprint != before


def sweep(config: DataConfig, **changes: Any) -> Corpus:
    return open_corpus(dataclasses.replace(config, **changes), vocab_size=1200)


def test_a_mixture_is_exact_in_any_window_and_without_a_weight_a_source_is_left_out(
    config: DataConfig, tokenizer: Tokenizer
) -> None:
    made(config, tokenizer)
    mixed = sweep(config, mix={"c++": 1.0, "wikipedia_en": 3.0})
    for start in (0, 7_777, 123_456):
        sources = mixed.train.sources[mixed.train.numbers_of(mixed.train.locate(np.arange(start, start + 10_000)))]
        assert [mixed.sources[s] for s in (0, 1)] == ["c++", "wikipedia_en"]
        assert np.bincount(sources).tolist() == [2_500, 7_500]
    alone = sweep(config, mix={"c++": 1.0})
    assert set(alone.train.epochs(500)) == {0} and alone.sources == mixed.sources
    assert mixed.valid.n_packs == alone.valid.n_packs > 0


@pytest.mark.parametrize(
    ("given", "mixtures"),
    [
        (["data.mix={code:3,en:1}"], [{"code": 3.0, "en": 1.0}]),
        (["data.mix={code:3,c++:1},{code:1,en:1}", "-m"], [{"code": 3.0, "c++": 1.0}, {"code": 1.0, "en": 1.0}]),
        (["data.mix.code=1,2", "+data.mix.en=1", "-m"], [{"code": 1.0, "en": 1.0}, {"code": 2.0, "en": 1.0}]),
    ],
)
def test_a_mixture_is_swept_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, given: list[str], mixtures: list[dict[str, float]]
) -> None:
    found: list[dict[str, float]] = []

    def main() -> None:
        arguments = [argument for argument in sys.argv[1:] if argument != "-m"]
        overrides = OverridesParser.create().parse_overrides(arguments)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            for point in BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]:
                found.append(to_config(compose("train", overrides=list(point))).data.mix)

    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    command.run(main, "train")
    assert found == mixtures


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("data.mix={code:much}", "data.mix"),
        ("data.mix={code:-1}", "data.mix.code (-1.0) must be 0 or more"),
        ("data.mix={code:0}", "must give some source a weight"),
        ("data.mix.code=nan", "data.mix.code (nan) must be 0 or more"),
    ],
)
def test_a_mixture_that_cannot_be_is_told_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str, sentence: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", given])
    with pytest.raises(SystemExit):
        command.run(lambda: pytest.fail("it runs"), "train")
    assert sentence in capsys.readouterr().err


def test_a_weight_below_zero_is_told_once(config: DataConfig) -> None:
    assert [*dataclasses.replace(config, mix={"code": -3.0}).problems()] == ["data.mix.code (-3.0) must be 0 or more"]
    (problem,) = dataclasses.replace(config, mix={"code": 0.0}).problems()
    assert problem.endswith("must give some source a weight")
