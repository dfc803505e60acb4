"""Tokenizers give text back, agree with SentencePiece, and count its bytes."""

import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data import tokenizer as module
from data.config import DataError
from data.hf_tokenizer import write_hf_tokenizer
from data.mixed_text import mixed_lines
from data.tokenizer import (
    Tokenizer,
    adds_bos,
    cut,
    encode_documents,
    line_start,
    load_tokenizer,
    save_tokenizer,
    sentencepiece_proto,
    train_tokenizer,
)

# U+2581 is how SentencePiece writes a space, so it cannot stand for itself; surrogates are no characters.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\0"))


@given(TEXT)
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_and_its_bytes_add_up(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_ids_are_sentencepieces_own(tokenizer: Tokenizer) -> None:
    own = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    assert all(tokenizer.encode(line) == own.encode(line) for line in mixed_lines())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 1200)


def test_training_does_not_depend_on_the_threads(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = train_tokenizer(iter(mixed_lines()), tmp_path / "t.model", vocab_size=1200, threads=1)
    assert [again.encode(line) for line in mixed_lines()] == [tokenizer.encode(line) for line in mixed_lines()]


def test_a_vocabulary_larger_than_the_text_allows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer of 5000 pieces can be trained on this text"):
        train_tokenizer(iter(["a b c"]), tmp_path / "t.model", vocab_size=5000, threads=1)


def anchored(tokenizer: Tokenizer, path: Path, **rules: bool) -> Tokenizer:
    """Write a SentencePiece model again with other rules about blanks."""
    proto = sentencepiece_proto(tokenizer.path)
    for name, value in rules.items():
        setattr(proto.normalizer_spec, name, value)
    path.write_bytes(proto.SerializeToString())
    return load_tokenizer(path)


@pytest.mark.parametrize("kind", ["words", "prefix", "trimmed", "huggingface"])
def test_a_long_document_in_parts_has_the_ids_of_the_whole(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    match kind:
        case "prefix":
            tokenizer = anchored(tokenizer, tmp_path / "t.model", add_dummy_prefix=True)
        case "trimmed":
            tokenizer = anchored(tokenizer, tmp_path / "t.model", add_dummy_prefix=True, remove_extra_whitespaces=True)
        case "huggingface":
            write_hf_tokenizer(tokenizer, tmp_path, add_bos=False, max_len=64)
            tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert kind != "words" or tokenizer.words is not None  # type: ignore[attr-defined]
    text = "".join(mixed_lines()) + "word " * 3000
    whole = tokenizer.encode(text)
    monkeypatch.setattr(module, "PIECE_CHARS", 700)
    assert len(list(cut(text, 700, tokenizer.last_cut))) > 50
    framed = encode_documents(tokenizer, [text, "b"], add_bos=True, add_eos=True)
    assert framed[0].tolist() == [1, *whole, 2] and framed[1].tolist() == [1, *tokenizer.encode("b"), 2]
    parts = list(cut(text, 900, tokenizer.last_cut))
    found = []
    for part in parts:
        ends = {"begins": part is parts[0], "ends": part is parts[-1]}
        found += encode_documents(tokenizer, [part], add_bos=True, add_eos=True, **ends)[0].tolist()
    assert found == [1, *whole, 2]


@given(st.text(), st.integers(2, 40))
@settings(deadline=None)
def test_cutting_loses_nothing_and_keeps_its_limit(tokenizer: Tokenizer, text: str, limit: int) -> None:
    for last_cut in (line_start, tokenizer.last_cut):
        parts = list(cut(text, limit, last_cut))
        assert "".join(parts) == text and all(0 < len(part) <= limit for part in parts)


def test_a_tokenizer_is_found_again_in_the_folder_it_was_saved_to(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path / "a")
    assert load_tokenizer(tmp_path / "a").fingerprint == tokenizer.fingerprint
    assert load_tokenizer(tmp_path / "a" / "tokenizer.model").encode("x y") == tokenizer.encode("x y")


@pytest.mark.parametrize("add_bos", [False, True])
def test_tokenizer_json_gives_the_same_ids_bytes_and_text(tokenizer: Tokenizer, tmp_path: Path, add_bos: bool) -> None:
    write_hf_tokenizer(tokenizer, tmp_path, add_bos=add_bos, max_len=64)
    fast = load_tokenizer(tmp_path / "tokenizer.json")
    for line in mixed_lines():
        ids = tokenizer.encode(line)
        assert fast.encode(line) == ids and fast.decode(ids) == line
    assert np.array_equal(fast.token_bytes(), tokenizer.token_bytes())
    assert (fast.bos_id, fast.eos_id, fast.vocab_size) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.vocab_size,
    )
    assert adds_bos(tmp_path) is add_bos


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("missing.model", "does not exist"),
        ("empty", "holds no tokenizer"),
        ("bad.model", "is not a SentencePiece model"),
        ("bad.json", "is not a tokenizer.json"),
    ],
)
def test_what_is_no_tokenizer_is_told(tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / "empty").mkdir()
    for bad in ("bad.model", "bad.json"):
        (tmp_path / bad).write_text("not a model")
    with pytest.raises(DataError, match=sentence):
        load_tokenizer(tmp_path / name)


@pytest.mark.skipif("INTERNLM_TOKENIZER" not in os.environ, reason="INTERNLM_TOKENIZER names no V7_sft.model")
def test_internlms_tokenizer_has_its_published_ids() -> None:
    internlm = load_tokenizer(os.environ["INTERNLM_TOKENIZER"])
    for text, ids in {
        "Hello, world!": [1, 9843, 328, 2028, 346],
        "今天天气晴朗适合出门散步": [1, 67577, 69095, 63010, 61770, 67783, 69301, 74732],
        "def f(x):\n    return x": [1, 882, 413, 2226, 1122, 388, 821, 991],
        '{"text": "Hello"}\n': [1, 5071, 1464, 921, 461, 9843, 16841],
    }.items():
        assert encode_documents(internlm, [text], add_bos=True, add_eos=False)[0].tolist() == ids
