"""Fixtures of `tests/corpus_fixtures.py`, and a tokenizer with the tokens of the built-in templates."""

import pytest

from data.tokenizer import Tokenizer
from tests.corpora import remade
from tests.corpus_fixtures import *  # noqa: F403

SYMBOLS = ["<eoh>", "<eoa>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def pieces(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """User-defined pieces at the end of a model, as InternLM's has them."""
    return remade(tokenizer, tmp_path_factory.mktemp("chat") / "tokenizer.model", SYMBOLS)
