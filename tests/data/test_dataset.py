"""A prepared corpus is opened for training, or the error names what is wrong."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corpus.config import DataError
from data.dataset import Corpus, open_corpus
from data.tokenizer import Tokenizer
from tests.corpora import lines, local, made, write
from tests.data.conftest import data_config

TEXTS = {"c++": [f"int x{i} = {i};" for i in range(40)], "wiki": [f"Document {i} of many words" for i in range(80)]}


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return prepared(tmp_path, tokenizer, TEXTS)


def prepared(folder: Path, tokenizer: Tokenizer, texts: dict[str, list[str]]) -> Path:
    records = [{"text": text, "set": source} for source, its in texts.items() for text in its]
    write(folder, {"a.jsonl": lines(records)})
    config = local(folder, "a.jsonl", source_key="set", valid_fraction=0.1)
    made(config, tokenizer)
    return Path(config.path)


def opened(folder: Path, **changes: Any) -> Corpus:
    return open_corpus(data_config(folder, **changes), vocab_size=1024)


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        ("tokenizer/tokenizer.model", b"", b"\xc0\x3e\x01", "tokenizer.model"),
        ("corpus.json", b'"splits"', b'"none"', "corpus.json"),
        ("train/wiki-00000.json", b'"tokenizer": "', b'"tokenizer": "other', "wiki-00000.bin"),
    ],
)
def test_changed_corpus_is_reported(folder: Path, file: str, old: bytes, new: bytes, named: str) -> None:
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content.replace(old, new) if old else content + new)
    with pytest.raises(DataError, match=named):
        opened(folder)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"seq_len": 100_000, "packing": "internlm"}, "100000"),
        ({"mix": {"en": 1.0}}, r"data.mix.en: .*c\+\+, wiki"),
        ({"mix": {"c++": 1.0, "wiki": 1.0}, "seq_len": 1_000, "packing": "internlm"}, r"c\+\+"),
        ({"packing": "best"}, r"data.packing \(best\)"),
    ],
)
def test_unfit_settings_are_reported(folder: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(DataError, match=named):
        opened(folder, **settings)


def test_small_vocabulary_is_reported(folder: Path) -> None:
    with pytest.raises(DataError, match="model.vocab_size=1024"):
        open_corpus(data_config(folder), vocab_size=999)


def test_fingerprint_is_of_the_tokens(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    same = prepared(tmp_path / "same", tokenizer, TEXTS)
    other = prepared(tmp_path / "other", tokenizer, TEXTS | {"wiki": [*TEXTS["wiki"][:-1], "more"]})
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
