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

# Characters that pieces join with, and that SentencePiece or numpy could take for others.
ALPHABET = "aab \t\n\r  e\u0301é,.(_=今天😀\u2581\0\u00a0\ufeff0" + "the <s>"

Both = tuple[CachedBPE, sentencepiece.SentencePieceProcessor]


@pytest.fixture(scope="module", params=["plain", "whitespace", "indents", "symbols"])
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary whose pieces stay within words, and three whose pieces reach across blanks and line ends."""
    proto = sentencepiece_proto(tokenizer.path)
    kinds = proto.SentencePiece
    pieces = {
        "plain": [],
        "whitespace": ["\n\n", "\n▁▁", "▁\n", ",\n", "\n▁▁\n", "a▁b"],
        "indents": ["▁\n", "▁▁\n", "\n▁\n", "\n▁▁\n", "\n\n"],
        "symbols": ["e▁t", "<s>x", "aa\n▁a"],
    }
    worst = min(piece.score for piece in proto.pieces)
    for number, piece in enumerate(pieces[request.param]):
        kind = kinds.USER_DEFINED if request.param == "symbols" else kinds.NORMAL
        proto.pieces.add(piece=piece, score=worst - 1 - number if kind == kinds.NORMAL else 0.0, type=kind)
    if request.param in ("whitespace", "indents"):
        proto.pieces.add(piece="\n", score=worst - 100, type=kinds.NORMAL)  # merges begin with single characters
    path = tmp_path_factory.mktemp("model") / "t.model"
    path.write_bytes(proto.SerializeToString())
    return path


def encoder(path: Path) -> Both:
    found = load_tokenizer(path)
    assert isinstance(found, SentencePieceTokenizer) and found.cached is not None
    return found.cached, sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="module")
def both(model: Path) -> Both:
    return encoder(model)


@given(
    texts=st.lists(
        st.one_of(st.text(ALPHABET, max_size=60), st.text(st.characters(exclude_categories=["Cs"]))), max_size=6
    )
)
@settings(max_examples=100, deadline=None)
def test_any_texts_have_sentencepiece_ids(both: Both, texts: list[str]) -> None:
    words, own = both
    found = words.encode(texts)
    assert [ids.tolist() for ids in found] == [own.encode(text) for text in texts]
    assert all(ids.dtype == np.uint32 for ids in found)


def test_indented_lines_are_split_where_pieces_allow(model: Path, both: Both) -> None:
    words, own = both
    assert words.split_before_indents == (
        own.piece_to_id("\n▁▁") == own.unk_id() and own.piece_to_id("aa\n▁a") == own.unk_id()
    )
    draw = random.Random(0)
    texts = ["".join(draw.choice(["a", "b", " ", " ", "\n", "\n"]) for _ in range(40)) for _ in range(400)]
    texts += [*mixed_lines(), "".join(mixed_lines())]
    assert [ids.tolist() for ids in words.encode(texts)] == [own.encode(text) for text in texts]


def test_full_cache_and_long_words_keep_the_ids(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHED_WORDS", 64)
    monkeypatch.setattr(module, "LONGEST_WORD", 5)
    words, own = encoder(tokenizer.path)
    draw = random.Random(0)
    lines = mixed_lines()
    for _ in range(30):
        texts = draw.sample(lines, 20)
        assert [ids.tolist() for ids in words.encode(texts)] == [own.encode(text) for text in texts]
    assert words.n_words < 5000, "the cache was cleared"


def thue_morse(n: int) -> str:
    return "".join("st"[i.bit_count() % 2] for i in range(n))


def test_words_made_to_collide_keep_their_ids(tokenizer: Tokenizer) -> None:
    """A polynomial modulo 2**64 gives this word and its opposite one value, whatever its base."""
    words, own = encoder(tokenizer.path)
    one = thue_morse(2048)
    chars = np.frombuffer(one.encode("utf-32-le"), dtype=np.uint32)
    assert words.splits(chars, np.array([2048])).tolist() == [0], "it is one word"
    other = one.translate(str.maketrans("st", "ts"))
    text = f"{one}, {other}, {one}"
    assert words.encode([text])[0].tolist() == own.encode(text) and own.encode(one) != own.encode(other)


def test_long_texts_are_split_between_words(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    words, own = both
    text = "".join(mixed_lines()) + "a" * 3000 + "\u2581word " * 300
    monkeypatch.setattr(module, "LONGEST_TEXT", 700)
    assert [ids.tolist() for ids in words.encode(["a b", text, "", "c"])] == [
        own.encode(one) for one in ("a b", text, "", "c")
    ]  # fmt: skip


RULES = [
    ("normalizer_spec", {"add_dummy_prefix": True, "remove_extra_whitespaces": True}, True),
    ("normalizer_spec", {"escape_whitespaces": False}, False),
    ("trainer_spec", {"model_type": 1}, False),
    ("trainer_spec", {"byte_fallback": False}, False),
]


@pytest.mark.parametrize(("section", "rules", "is_cached"), RULES)
def test_models_with_other_rules_have_sentencepiece_ids(
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
