"""Tokenizers decode to the text they encoded, agree with SentencePiece, and count its bytes."""

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer

from corpus.config import DataError
from data.hf_tokenizer import export_problem, write_hf_tokenizer
from data.mixed_text import mixed_lines
from data.tokenizer import INCOMPLETE, Tokenizer, adds_bos, encode_documents, load_tokenizer, save_tokenizer
from generate import TextStream
from tests.corpora import exported, remade

# U+2581 is how SentencePiece writes a space, so it cannot stand for itself; surrogates are no characters.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


@given(TEXT)
@settings(max_examples=100, deadline=None)
def test_round_trip_and_byte_counts(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_bos_and_eos_of_documents(tokenizer: Tokenizer) -> None:
    texts = ["a b", "", "c"]
    for bos, eos in ((True, False), (False, True)):
        found = encode_documents(tokenizer, texts, add_bos=bos, add_eos=eos)
        assert [ids.tolist() for ids in found] == [[*[1] * bos, *tokenizer.encode(t), *[2] * eos] for t in texts]
        assert all(ids.dtype == np.uint32 for ids in found)


def test_folder_with_both_formats(tokenizer: Tokenizer, tmp_path: Path) -> None:
    exported(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).path.name == "tokenizer.model"
    for rule in ("add_dummy_prefix", "remove_extra_whitespaces"):
        remade(tokenizer, tmp_path / "tokenizer.model", (), "NORMAL", **{rule: True})
        assert load_tokenizer(tmp_path).path.name == "tokenizer.json", "they disagree"


def sentencepiece_of(path: Path, **options: Any) -> Tokenizer:
    """Train a SentencePiece model with `spm_train`'s defaults, but for `options`."""
    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=(line for text in mixed_lines() for line in text.split("\n") if line),
            model_writer=file, vocab_size=900, hard_vocab_limit=False, minloglevel=2, **options,
        )  # fmt: skip
    return load_tokenizer(path)


VERBATIM = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}  # but for the blank before a text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"user_defined_symbols": ["<eoh>", "def"], "add_dummy_prefix": False},
        {"model_type": "unigram", "byte_fallback": True, **VERBATIM},
        {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "nfkc_cf", "add_dummy_prefix": False},
        {"model_type": "bpe", "byte_fallback": True, **VERBATIM},
    ],
    ids=["unigram", "unigram with symbols", "unigram bytes", "bpe bytes folded", "bpe bytes prefixed"],
)
def test_export_of_sentencepiece_rules(tmp_path: Path, options: dict) -> None:
    from transformers import AutoTokenizer

    own = sentencepiece_of(tmp_path / "t.model", **options)
    exported(own, tmp_path)
    theirs, loaded = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert export_problem(own) is None and settings["add_prefix_space"] == options.get("add_dummy_prefix", True)
    ordered = sorted if "bpe" not in options.values() else list  # segmentations of equal probability
    for text in ["", " ", "  two  blanks ", "a <eoh> def<eoh>", *mixed_lines()]:
        ids = own.encode(text)
        assert ordered(theirs(text)["input_ids"]) == ordered(loaded.encode(text)) == ordered(ids)
        assert own.unk_id in ids or theirs.decode(ids) == loaded.decode(ids) == own.decode(ids)


@pytest.mark.parametrize("options", [{"model_type": "word"}, {"user_defined_symbols": ["<eoh>"]}], ids=str)
def test_tokenizer_without_an_export(tmp_path: Path, options: dict) -> None:
    from transformers import AutoTokenizer

    own = sentencepiece_of(tmp_path / "t.model", **options)
    assert str(own.path) in str(export_problem(own))
    (tmp_path / "hf").mkdir()
    write_hf_tokenizer(own, tmp_path / "hf", add_bos=False, max_len=64)
    assert load_tokenizer(tmp_path / "hf" / "tokenizer").encode("a b") == own.encode("a b")
    with pytest.raises((ValueError, OSError)):
        AutoTokenizer.from_pretrained(tmp_path / "hf")


def test_zero_byte_piece(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """InternLM's model has one, which SentencePiece takes for unused."""
    own = remade(tokenizer, tmp_path / "t.model", ["\0"], "NORMAL")
    fast = exported(own, tmp_path)
    for text in ("\0", " \0\0 today", "\n\0"):
        ids = own.encode(text)
        assert fast.encode(text) == ids == own.encode_many([text])[0].tolist() and fast.decode(ids) == text


def test_bad_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for bad in ("bad.model", "bad.json"):
        (tmp_path / bad).write_text("not a model")
    for name in ("missing.model", "empty", "bad.model", "bad.json"):
        with pytest.raises(DataError, match=name):
            load_tokenizer(tmp_path / name)


@pytest.mark.skipif("INTERNLM_TOKENIZER" not in os.environ, reason="INTERNLM_TOKENIZER names no V7_sft.model")
def test_internlm_tokenizer_has_its_published_ids() -> None:
    internlm = load_tokenizer(os.environ["INTERNLM_TOKENIZER"])
    for text, ids in {
        "Hello, world!": [1, 9843, 328, 2028, 346],
        "今天天气晴朗适合出门散步": [1, 67577, 69095, 63010, 61770, 67783, 69301, 74732],
        "def f(x):\n    return x": [1, 882, 413, 2226, 1122, 388, 821, 991],
        '{"text": "Hello"}\n': [1, 5071, 1464, 921, 461, 9843, 16841],
    }.items():
        assert [internlm.bos_id, *internlm.encode(text)] == ids


@pytest.fixture(scope="module", params=["byte-level", "metaspace"])
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Tokenizers as GPT-2's and as Llama 2's, trained by Hugging Face's own library."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    special = ["<unk>", "<|endoftext|>", "<|im_end|>"]
    if request.param == "byte-level":
        fast = Fast(models.BPE())
        fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        fast = Fast(models.BPE(unk_token="<unk>", byte_fallback=True))
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        fast.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet = []
    options = {"vocab_size": 1500, "special_tokens": special[:3], "initial_alphabet": alphabet}
    fast.train_from_iterator(mixed_lines() + special[3:], trainers.BpeTrainer(**options, show_progress=False))
    folder = tmp_path_factory.mktemp(request.param)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    return load_tokenizer(folder)


def test_hugging_face_tokenizer_keeps_its_ids(foreign: Tokenizer, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from transformers import AutoTokenizer

    own = Fast.from_file(str(foreign.path))
    assert foreign.eos_id == own.token_to_id("<|endoftext|>") and foreign.bos_id is None
    texts = ["".join(mixed_lines()[i : i + 60]) for i in range(0, 900, 60)]
    whole = [own.encode(text, add_special_tokens=False).ids for text in texts]
    assert [ids.tolist() for ids in foreign.encode_many(texts)] == whole
    assert [foreign.decode(ids) for ids in whole] == [own.decode(ids) for ids in whole]
    exported(foreign, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*texts, "a<|im_end|>b <|endoftext|>"]:
        assert theirs.encode(text) == foreign.encode(text, special=True)
    assert theirs.eos_token_id == foreign.eos_id


@pytest.mark.parametrize("kind", ["own", "own.json", "foreign", "prefixed"])
def test_streamed_text(tokenizer: Tokenizer, foreign: Tokenizer, tmp_path: Path, kind: str) -> None:
    some = {"foreign": foreign}.get(kind, tokenizer)
    if kind == "prefixed":
        some = remade(tokenizer, tmp_path / "t.model", add_dummy_prefix=True)
    if kind.endswith("json"):
        some = exported(some, tmp_path)
    text = " 🦄é 今天天气\n\n ᚠ今 龘 y  z"
    text = some.decode(some.encode(f"x{text}"))[1:]  # of one that has no bytes
    for prompt in ("x", "今"):
        ids = some.encode(prompt + text)[len(some.encode(prompt)) :]
        stream = TextStream(some, some.encode(prompt), [])
        pieces = [stream.add(token) for token in ids]
        assert "".join(pieces) + stream.finish() == text and INCOMPLETE not in "".join(pieces)
    stopping = TextStream(some, some.encode("x"), ["天气"])
    shown = "".join(map(stopping.add, some.encode("x" + text)[len(some.encode("x")) :]))
    assert shown == stopping.text == text.split("天气")[0] and stopping.stopped


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("kind", ["sequence", "bos and eos", "none"])
def test_export_adds_what_training_did(foreign: Tokenizer, tmp_path: Path, kind: str, add_bos: bool) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import processors as p
    from transformers import AutoTokenizer

    fast, begin, end = Fast.from_file(str(foreign.path)), ("<unk>", 0), ("<|endoftext|>", 1)
    template = p.TemplateProcessing(single="<unk> $A", pair="<unk> $A $B", special_tokens=[begin])
    both = p.TemplateProcessing(single="<unk> $A <|endoftext|>", pair="$A $B", special_tokens=[begin, end])
    kinds = {"sequence": p.Sequence([p.ByteLevel(), template]), "bos and eos": both}
    if kind in kinds:
        fast.post_processor = kinds[kind]
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<unk>", "eos_token": "<|endoftext|>"}')
    own = load_tokenizer(tmp_path)
    assert own.bos_id is not None and adds_bos(tmp_path) == (kind != "none")
    exported(own, tmp_path / "hf", add_bos=add_bos)
    expected = [0] * add_bos + own.encode("a b")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("a b")["input_ids"] == expected
    assert Fast.from_file(str(tmp_path / "hf" / "tokenizer.json")).encode("a b").ids == expected
    assert adds_bos(tmp_path / "hf") is add_bos


def test_sentencepiece_folder_adds_bos(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As InternLM's convert2hf.py leaves them."""
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    for config, adds in (({}, True), ({"add_bos_token": False}, False)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", **config}))
        assert adds_bos(tmp_path) is adds


@pytest.mark.parametrize("kind", ["own", "unigram", "foreign"])
def test_special_tokens_in_text(tokenizer: Tokenizer, foreign: Tokenizer, tmp_path: Path, kind: str) -> None:
    some = foreign if kind == "foreign" else tokenizer
    if kind == "unigram":
        some = sentencepiece_of(tmp_path / "t.model", byte_fallback=True, **VERBATIM)
    name = next(name for name, token in some.special_ids.items() if token == some.eos_id)
    text = f"strike {name} that{name}"
    plain, found = (encode_documents(some, [text], add_bos=False, add_eos=False, special=s)[0] for s in (False, True))
    assert not set(plain.tolist()) & {some.bos_id, some.eos_id} and some.decode(plain.tolist()) == text
    assert plain.tolist() == some.encode(text) and found.tolist() == some.encode(text, special=True)
    assert (found == some.eos_id).sum() == 2


def test_ids_without_a_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    exported(tokenizer, tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["added_tokens"].append({**stored["added_tokens"][0], "id": 1210, "content": "<|far|>"})
    stored["model"]["vocab"]["<|far|>"] = 1210
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    far = load_tokenizer(tmp_path / "tokenizer.json")
    assert far.vocab_size == 1211 and far.encode("<|far|>", special=True) == [1210] and len(far.token_bytes()) == 1211


def test_name_is_looked_up_on_the_hub(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    exported(tokenizer, tmp_path)
    original = AutoTokenizer.from_pretrained
    look_up = Mock(side_effect=lambda _, **options: original(tmp_path, **options))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", look_up)
    found = load_tokenizer("somebody/model")
    assert look_up.call_args.args == ("somebody/model",)
    assert [found.encode(line) for line in mixed_lines()] == [tokenizer.encode(line) for line in mixed_lines()]
    assert (found.bos_id, found.eos_id, found.vocab_size) == (1, 2, 1000)
    assert np.array_equal(found.token_bytes(), tokenizer.token_bytes())
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", Mock(side_effect=OSError("unknown\nmore lines")))
    with pytest.raises(DataError, match=r"tokenizer.model \(no/such\)"):
        load_tokenizer("no/such")
