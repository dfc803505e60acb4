"""A text is cut only where that is proven to change no id, and otherwise encoded whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Fast

from data import tokenizer as module
from data.mixed_text import mixed_lines
from data.safe_split import LOWER, SUFFIXES, UPPER, cuts_at_spaces, last_space
from data.tokenizer import Tokenizer, encode_documents, load_tokenizer

LLAMA = (
    rf"{SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{SUFFIXES}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{SUFFIXES}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ALPHABET = [
    "a",
    "the ",
    "word",
    " ",
    "  ",
    "\n",
    "\t",
    "\u00a0",
    ".",
    "'s",
    "12",
    "今天",
    "é",
    "e\u0301",
    "_x",
    "\u2581",
    "<|x|>",
]


def byte_level(*before: Any, regex: bool = False, prefix: bool = False, behavior: str = "isolated") -> Any:
    splits = [pre_tokenizers.Split(Regex(b), behavior) if isinstance(b, str) else b for b in before]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)])


PROVEN: dict[str, Any] = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "prefixed": byte_level(pre_tokenizers.Digits(individual_digits=True), regex=True, prefix=True),
    "llama3": byte_level(LLAMA),
    "gpt4o": byte_level(r"\p{N}{1,3}", GPT_4O),
    "metaspace": pre_tokenizers.Metaspace(prepend_scheme="always"),
    "first": pre_tokenizers.Metaspace(prepend_scheme="first"),
}
UNPROVEN: dict[str, Any] = {
    "pairs": byte_level(r"\w+ \w+|\s+|\S+"),
    "joined": byte_level(LLAMA, behavior="merged_with_next"),
    "one word": byte_level(),
    "no blanks": byte_level(r" ?\p{L}+"),
}


def trained(pre_tokenizer: Any, path: Path, change: Callable[[Fast], Any] = lambda fast: None) -> Tokenizer:
    spaced = isinstance(pre_tokenizer, pre_tokenizers.Metaspace)
    fast = Fast(models.BPE(unk_token="<unk>", byte_fallback=spaced))
    fast.pre_tokenizer = pre_tokenizer
    fast.decoder = decoders.Metaspace() if spaced else decoders.ByteLevel()
    alphabet = [] if spaced else pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<|x|>", *([f"<0x{byte:02X}>" for byte in range(256)] if spaced else [])]
    texts = mixed_lines()[::3] + ["the word. the word.  the\n"] * 50
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special[:2], initial_alphabet=alphabet)
    fast.train_from_iterator(texts + special[2:], trainer)
    change(fast)
    fast.save(str(path / "tokenizer.json"))
    return load_tokenizer(path)


@pytest.fixture(scope="module", params=PROVEN)
def proven(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return trained(
        PROVEN[request.param], tmp_path_factory.mktemp("t"), lambda fast: setattr(fast, "normalizer", normalizers.NFC())
    )


@given(st.lists(st.sampled_from(ALPHABET), max_size=40).map("".join), st.integers(2, 12))
@settings(max_examples=150, deadline=None)
def test_parts_have_the_ids_of_the_whole(proven: Tokenizer, text: str, size: int) -> None:
    assert proven.last_cut(text) == last_space(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_CHARS", size)
        assert encode_documents(proven, [text], add_bos=False, add_eos=False)[0].tolist() == proven.encode(text)


@pytest.mark.parametrize("kind", UNPROVEN)
def test_what_is_not_proven_is_encoded_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = trained(UNPROVEN[kind], tmp_path)
    text = "the word. the word.  the\n" * 30
    assert last_space(text) and not tokenizer.last_cut(text)
    monkeypatch.setattr(module, "PIECE_CHARS", 50)
    found = encode_documents(tokenizer, [text], add_bos=False, add_eos=False)
    assert found[0].tolist() == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("content", "rules", "proven"),
    [
        ("<mask>", {}, True),
        ("<mask>", {"lstrip": True}, True),
        ("<mask>", {"rstrip": True}, False),
        ("New York", {}, False),
        (" x", {}, False),
        ("    ", {}, True),
        ("    ", {"single_word": True}, False),
        (" ", {}, False),
    ],
)
def test_added_tokens_may_lie_across_a_space(
    tmp_path: Path, content: str, rules: dict[str, bool], proven: bool
) -> None:
    from tokenizers import AddedToken

    tokenizer = trained(PROVEN["gpt2"], tmp_path, lambda fast: fast.add_tokens([AddedToken(content, **rules)]))
    assert bool(tokenizer.last_cut("a b")) is proven


def changed(tokenizer: Tokenizer, *path: str, value: Any) -> bool:
    stored = json.loads(tokenizer.path.read_text())
    place = stored
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return cuts_at_spaces(stored)


def test_what_changes_a_text_or_merges_across_spaces_is_not_proven(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from data.hf_tokenizer import write_hf_tokenizer

    write_hf_tokenizer(tokenizer, tmp_path, add_bos=False, max_len=64)
    one_word = load_tokenizer(tmp_path / "tokenizer.json")
    vocab = json.loads(one_word.path.read_text())["model"]["vocab"]
    assert changed(one_word, "truncation", value=None) and one_word.last_cut("a b") == 1
    assert not changed(one_word, "model", "vocab", value={**vocab, "a\u2581b": 5000})
    assert not changed(one_word, "model", "vocab", value={**vocab, "<0x41>b": 5000})
    assert not changed(one_word, "model", "byte_fallback", value=False)
    assert not changed(one_word, "model", "ignore_merges", value=True)
    assert not changed(one_word, "model", "type", value="Unigram")
    assert not changed(one_word, "normalizer", value={"type": "NFKC"})
    assert not changed(one_word, "normalizer", value={"type": "Replace", "pattern": {"String": "a "}, "content": "b"})


def test_a_tokenizer_json_that_cuts_texts_short_does_not_do_so_here(tmp_path: Path) -> None:
    def short(fast: Fast) -> None:
        fast.enable_truncation(5)
        fast.enable_padding(length=20)

    tokenizer = trained(PROVEN["gpt2"], tmp_path, short)
    assert 10 < len(tokenizer.encode("the word. " * 9)) != 20
