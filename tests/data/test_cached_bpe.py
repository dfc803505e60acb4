"""Encoding by words gives SentencePiece's own ids, for any text and any vocabulary."""

import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data import cached_bpe as module
from data.cached_bpe import CachedBPE
from data.mixed_text import mixed_lines
from data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer, sentencepiece_proto
from tests.corpora import remade

# Characters that pieces join with, and that SentencePiece or numpy could take for others.
ALPHABET = "aab \t\n\r  e\u0301é,.(_=今天😀\u2581\0\u00a0\ufeff0" + "the <s>"

Both = tuple[CachedBPE, sentencepiece.SentencePieceProcessor]


@pytest.fixture(scope="module", params=["plain", "whitespace", "indents", "symbols"])
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary whose pieces stay within words, and three whose pieces reach across blanks and line ends."""
    path, proto = tmp_path_factory.mktemp("model") / "t.model", sentencepiece_proto(tokenizer.path)
    pieces = {
        "plain": [],
        "whitespace": ["\n\n", "\n▁▁", "▁\n", ",\n", "\n▁▁\n", "a▁b"],
        "indents": ["▁\n", "▁▁\n", "\n▁\n", "\n▁▁\n", "\n\n"],
        "symbols": ["e▁t", "<s>x", "aa\n▁a"],
    }
    if request.param == "symbols":
        return remade(tokenizer, path, pieces["symbols"]).path
    worst = min(piece.score for piece in proto.pieces)
    for number, piece in enumerate(pieces[request.param], 1):
        proto.pieces.add(piece=piece, score=worst - number, type=proto.SentencePiece.NORMAL)
    if request.param != "plain":  # merges begin with single characters
        proto.pieces.add(piece="\n", score=worst - 100, type=proto.SentencePiece.NORMAL)
    path.write_bytes(proto.SerializeToString())
    return path


def encoder(path: Path) -> Both:
    found = load_tokenizer(path)
    assert isinstance(found, SentencePieceTokenizer) and found.cached is not None
    return found.cached, sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="module")
def both(model: Path) -> Both:
    return encoder(model)


def check_ids(both: Both, texts: list[str]) -> None:
    words, own = both
    found = words.encode(texts)
    assert [ids.tolist() for ids in found] == [own.encode(text) for text in texts]
    assert all(ids.dtype == np.uint32 for ids in found)


TEXT = st.one_of(st.text(ALPHABET, max_size=60), st.text(st.characters(exclude_categories=["Cs"])))


@given(texts=st.lists(TEXT, max_size=6))
@settings(max_examples=100, deadline=None)
def test_ids_are_sentencepieces(both: Both, texts: list[str]) -> None:
    check_ids(both, texts)


def test_splits_before_indents(both: Both) -> None:
    words, own = both
    reaches_across = any(own.piece_to_id(piece) != own.unk_id() for piece in ("\n▁▁", "aa\n▁a"))
    assert words.split_before_indents != reaches_across
    draw = random.Random(0)
    texts = ["".join(draw.choice(["a", "b", " ", " ", "\n", "\n"]) for _ in range(40)) for _ in range(400)]
    check_ids(both, [*texts, *mixed_lines(), "".join(mixed_lines())])


def test_full_cache_and_long_words(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHED_WORDS", 64)
    monkeypatch.setattr(module, "LONGEST_WORD", 5)
    both, draw, lines = encoder(tokenizer.path), random.Random(0), mixed_lines()
    for _ in range(30):
        check_ids(both, draw.sample(lines, 20))
    assert both[0].n_words < 5000, "the cache was cleared"


def test_words_made_to_collide(tokenizer: Tokenizer) -> None:
    """A polynomial modulo 2**64 gives this word and its opposite one value, whatever its base."""
    words, own = encoder(tokenizer.path)
    one = "".join("st"[i.bit_count() % 2] for i in range(2048))  # Thue-Morse
    chars = np.frombuffer(one.encode("utf-32-le"), dtype=np.uint32)
    assert words.splits(chars, np.array([2048])).tolist() == [0], "it is one word"
    other = one.translate(str.maketrans("st", "ts"))
    check_ids((words, own), [f"{one}, {other}, {one}"])
    assert own.encode(one) != own.encode(other)


def test_long_texts(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_TEXT", 700)
    check_ids(both, ["a b", "".join(mixed_lines()) + "a" * 3000 + "\u2581word " * 300, "", "c"])


RULES = [
    ("normalizer_spec", {"add_dummy_prefix": True, "remove_extra_whitespaces": True}, True),
    ("normalizer_spec", {"escape_whitespaces": False}, False),
    ("trainer_spec", {"model_type": 1}, False),
    ("trainer_spec", {"byte_fallback": False}, False),
]


@pytest.mark.parametrize(("section", "rules", "is_cached"), RULES)
def test_models_with_other_rules(
    tokenizer: Tokenizer, tmp_path: Path, section: str, rules: dict[str, object], is_cached: bool
) -> None:
    proto = sentencepiece_proto(tokenizer.path)
    for name, value in rules.items():
        setattr(getattr(proto, section), name, value)
    for piece in proto.pieces:
        if "byte_fallback" in rules and piece.type == proto.SentencePiece.BYTE:
            piece.type = proto.SentencePiece.NORMAL
    path = tmp_path / "t.model"
    path.write_bytes(proto.SerializeToString())
    other = load_tokenizer(path)
    assert isinstance(other, SentencePieceTokenizer) and (other.cached is not None) is is_cached
    own = sentencepiece.SentencePieceProcessor(model_file=str(path))
    draw = random.Random(0)
    texts = mixed_lines()[:300] + ["".join(draw.choices(ALPHABET, k=40)) for _ in range(300)]
    assert [ids.tolist() for ids in other.encode_many(texts)] == [own.encode(text) for text in texts]
