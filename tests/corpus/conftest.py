"""Fixtures of `tests/corpus_fixtures.py`."""

from tests.corpus_fixtures import *  # noqa: F403
