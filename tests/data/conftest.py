"""A small tokenizer, trained once."""

from pathlib import Path

import pytest

from data.mixed_text import mixed_lines
from data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer(iter(mixed_lines()), folder / "tokenizer.model", vocab_size=1200, threads=2)
