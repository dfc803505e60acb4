"""A small tokenizer, trained once, and a small corpus to be made."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from data.config import DataConfig
from data.mixed_text import mixed_lines
from data.tokenizer import Tokenizer, train_tokenizer
from tests.corpora import RECORDS, lines, local


@cache
def trained_once(folder: Path) -> Tokenizer:
    return train_tokenizer(iter(mixed_lines()), folder / "tokenizer.model", vocab_size=1000, threads=2)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return trained_once(tmp_path_factory.getbasetemp() / "tokenizer")


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Tests kill processes, not machines: what was written is there without it."""
    before, os.fsync = os.fsync, lambda _: None
    yield
    os.fsync = before


@pytest.fixture
def config(tmp_path: Path) -> Iterator[DataConfig]:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(RECORDS))
    yield local(tmp_path, "texts", source_key="meta.set")


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units, batches and shards of a few records."""
    monkeypatch.setattr("corpus.units.LEAST_UNIT_BYTES", 300)
    monkeypatch.setattr("corpus.units.BATCH_BYTES", 100)
    monkeypatch.setattr("corpus.merge.SHARD_BYTES", 400)
