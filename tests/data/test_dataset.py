"""A prepared corpus is opened for training, or the error names what is wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corpus.config import DataError
from data.dataset import Corpus, open_corpus
from data.manifest import check_exists, check_fits
from data.tokenizer import Tokenizer
from tests.data.conftest import data_config, write_corpus

TEXTS = {"c++": [f"int x{i} = {i};" for i in range(40)], "wiki": [f"Document {i} of many words" for i in range(80)]}


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return write_corpus(tmp_path / "corpus", tokenizer, TEXTS)


def opened(folder: Path, **changes: Any) -> Corpus:
    return open_corpus(data_config(folder, **changes), vocab_size=1024)


def damage(folder: Path, change: str) -> None:
    match change:
        case "tokenizer":
            path = folder / "tokenizer" / "tokenizer.model"
            path.write_bytes(path.read_bytes() + b"\xc0\x3e\x01")
        case "manifest":
            (folder / "corpus.json").write_text("{}")
        case "header":
            path = folder / "train" / "wiki-00000.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer": "other"}))
        case "no header":
            (folder / "train" / "wiki-00000.json").unlink()


@pytest.mark.parametrize(
    ("change", "settings", "named"),
    [
        ("tokenizer", {}, "tokenizer.model"),
        ("manifest", {}, "corpus.json"),
        ("header", {}, "wiki-00000.bin"),
        ("no header", {}, "wiki-00000.bin"),
        ("none", {"seq_len": 100_000, "packing": "internlm"}, "100000"),
        ("none", {"mix": {"en": 1.0}}, r"data.mix.en: .*c\+\+, wiki"),
        ("none", {"mix": {"c++": 1.0, "wiki": 1.0}, "seq_len": 1_000, "packing": "internlm"}, r"c\+\+"),
        ("none", {"packing": "best"}, r"data.packing \(best\)"),
    ],
)
def test_unfit_corpus_is_reported(folder: Path, change: str, settings: dict[str, Any], named: str) -> None:
    damage(folder, change)
    with pytest.raises(DataError, match=named):
        opened(folder, **settings)


def test_small_vocabulary_and_missing_corpus_are_reported_before_opening(folder: Path) -> None:
    with pytest.raises(DataError, match="model.vocab_size=1024"):
        check_fits(data_config(folder), vocab_size=999)
    with pytest.raises(DataError, match="model.vocab_size=1024"):
        open_corpus(data_config(folder), vocab_size=999)
    check_fits(data_config(folder / "none"), vocab_size=999)
    with pytest.raises(DataError, match="prepare_data.py data=mine data.input=..."):
        check_exists(data_config(folder / "none"), "data=mine")


def test_fingerprint_is_of_the_tokens(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    same = write_corpus(tmp_path / "same", tokenizer, TEXTS)
    other = write_corpus(tmp_path / "other", tokenizer, TEXTS | {"wiki": [*TEXTS["wiki"][:-1], "more"]})
    assert opened(folder).fingerprint == opened(same).fingerprint != opened(other).fingerprint


def test_mixture_is_exact_in_any_window_and_leaves_out_sources_without_weight(folder: Path) -> None:
    mixed = opened(folder, mix={"c++": 1.0, "wiki": 3.0})
    for start in (0, 7_777, 123_456):
        sources = mixed.train.source_of(mixed.train.locate(np.arange(start, start + 10_000)))
        assert np.bincount(sources).tolist() == [2_500, 7_500]
    alone = opened(folder, mix={"c++": 1.0})
    assert set(alone.train.epochs(500)) == {0} and alone.sources == mixed.sources
    both = opened(folder).train
    assert both.epochs(3 * both.n_packs) == {0: 3.0, 1: 3.0}
    assert mixed.valid.n_packs == alone.valid.n_packs > 0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mix": {"code": -3.0}}, ["data.mix.code"]),
        ({"mix": {"code": 0.0}}, ["data.mix"]),
        ({"seq_len": 1, "workers": -1, "pack_len": 3}, ["data.seq_len", "data.workers"]),
        ({"seed": -1, "micro_batch_size": 0}, ["data.micro_batch_size", "data.seed"]),
        ({"pack_len": 12}, ["data.pack_len"]),
        ({"pack_len": 16, "micro_batch_size": 3}, ["data.micro_batch_size"]),
        ({"pack_len": 16, "micro_batch_size": 4}, []),
    ],
)
def test_settings_that_cannot_be_are_reported_once_each(settings: dict[str, Any], named: list[str]) -> None:
    assert [problem.split(" (")[0] for problem in data_config(**settings).problems()] == named
