"""From files to a corpus: what is made, by however many processes, and of what."""

import dataclasses
import gzip
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import read as reading
from corpus.config import DataError, TokenizerConfig
from corpus.documents import Document, digest_of, split_of
from corpus.inputs import Item
from corpus.part import shares
from corpus.prepare import existing, prepare
from data.config import DataConfig
from data.dataset import open_corpus
from data.shards import Shard
from data.tokenizer import Tokenizer
from tests.corpora import RECORDS, contents, lines, local, made, texts_of


def test_a_corpus_holds_every_document_whole(config: DataConfig, tokenizer: Tokenizer) -> None:
    about = made(config, tokenizer)
    decoded = []
    for split, sources in about["splits"].items():
        for counts in sources.values():
            (stem,) = counts["shards"]
            shard = Shard(Path(config.path) / stem, verify=True)
            assert counts["documents"] == shard.n_documents and counts["tokens"] == shard.n_tokens
            for i in range(shard.n_documents):
                ids = shard.document(i).tolist()
                assert ids[-1] == tokenizer.eos_id
                decoded.append(tokenizer.decode(ids[:-1]))
                assert split_of(digest_of(Document(decoded[-1], "", ""), config), config) == split
    assert sorted(decoded) == sorted(record["text"] for record in RECORDS)
    corpus = open_corpus(config, vocab_size=1280)
    assert corpus.sources == ("c++", "wikipedia_en") and corpus.train.n_packs > 0 and corpus.valid.n_packs > 0
    assert corpus.bytes_per_token is not None and len(corpus.bytes_per_token) == 1280


def test_the_result_does_not_depend_on_the_workers(
    config: DataConfig, tokenizer: Tokenizer, small_blocks: None
) -> None:
    made(config, tokenizer, workers=1)
    other = dataclasses.replace(config, path=config.path + "2")
    made(other, tokenizer, workers=3)
    assert contents(config.path) == contents(other.path)
    assert len([name for name in contents(config.path) if name.endswith(".bin")]) > 4, "files of limited size"


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_parts_make_the_same_documents_whichever_ends_last(
    config: DataConfig,
    tokenizer: Tokenizer,
    tmp_path: Path,
    small_blocks: None,
    monkeypatch: pytest.MonkeyPatch,
    shards: int,
) -> None:
    (tmp_path / "texts" / "b.jsonl.gz").write_bytes(gzip.compress(lines([{"text": f"{i} more"} for i in range(40)])))
    monkeypatch.setattr(reading, "TEXT_BYTES", 300)
    monkeypatch.setattr("corpus.long.PIECE_CHARS", 200)
    for name in ("c", "d"):
        (tmp_path / "texts" / f"{name}.txt").write_text(f"{name} is a long text. " * 90)
    whole = made(config, tokenizer)
    other = dataclasses.replace(config, path=config.path + "2")
    order = random.Random(shards).sample(range(shards), shards)
    for shard in order:
        assert not Path(other.path).exists()
        about = made(other, tokenizer, shards=shards, shard=shard)
    assert about is not None
    for split, sources in whole["splits"].items():
        for source, counts in sources.items():
            for key in ("documents", "tokens", "text_bytes"):
                assert counts[key] == about["splits"][split][source][key]
    assert texts_of(config, whole, tokenizer) == texts_of(other, about, tokenizer)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=9), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_every_block_of_every_item_is_one_parts(sizes: list[int], shards: int) -> None:
    todo = [Item(str(i), "s", size=size) for i, size in enumerate(sizes)]
    parts = [shares(todo, shards, shard) for shard in range(shards)]
    for number in range(len(todo)):
        taken = [(first, step) for first, step in (part[number] for part in parts) if first >= 0]
        assert sorted(first for first, _ in taken) == list(range(len(taken))) and {step for _, step in taken} == {
            len(taken)
        }


def test_the_same_corpus_is_used_again_and_another_is_not_overwritten(config: DataConfig, tokenizer: Tokenizer) -> None:
    settings = TokenizerConfig(model=str(tokenizer.path), vocab_size=1200)
    assert not existing(config, settings)
    made(config, tokenizer)
    assert existing(dataclasses.replace(config, seq_len=64, workers=7), settings)
    with pytest.raises(DataError, match=r"was made with other settings: data.text_key \(text, now body\)"):
        existing(dataclasses.replace(config, text_key="body"), settings)
    with pytest.raises(DataError, match=r"tokenizer.add_bos \(False, now True\)"):
        existing(config, dataclasses.replace(settings, add_bos=True))


def test_a_tokenizer_without_the_asked_for_token_is_refused(
    config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corpus.prepare.load_tokenizer", lambda path: _without_eos(tokenizer))
    with pytest.raises(DataError, match=r"tokenizer.add_eos \(true\): .* has no such token"):
        made(config, tokenizer)


def _without_eos(tokenizer: Tokenizer) -> Tokenizer:
    other = type(tokenizer)(tokenizer.path)  # type: ignore[call-arg]
    other.eos_id = None
    return other


def test_a_long_document_takes_memory_in_proportion(tokenizer: Tokenizer) -> None:
    import tracemalloc

    from data.tokenizer import encode_documents

    text = ("a line of some words, again and again\n" * 10_000) * 8  # 3 MB
    tracemalloc.start()
    ids = encode_documents(tokenizer, [text], add_bos=False, add_eos=True)[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(ids) > 400_000
    assert peak < 4 * ids.nbytes + 20 * 2**20
    assert ids[:1000].tolist() == tokenizer.encode(text[:8000])[:1000]


def test_a_tokenizer_of_a_large_corpus_is_trained_on_the_beginning_of_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    for name in "ab":
        records = [{"text": f"{name}{i} some words of a text that goes on"} for i in range(4000)]
        (tmp_path / "texts" / f"{name}.jsonl").write_bytes(lines(records))
    monkeypatch.setattr(reading, "BLOCK_BYTES", 5000)
    monkeypatch.setattr("corpus.texts.LEAST_SAMPLE", 10_000)
    seen: list[str] = []

    def train(texts: Iterator[str], path: Path, **options: Any) -> None:
        seen.extend(texts)
        raise KeyboardInterrupt

    monkeypatch.setattr("corpus.prepare.train_tokenizer", train)
    for limit, most in ((1_000_000, 8000), (2_000, 100)):
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            settings = TokenizerConfig(vocab_size=500, train_bytes=limit)
            prepare(local(tmp_path, "texts"), settings, workers=1, on_progress=lambda counts: None)
        assert {text[0] for text in seen} == {"a", "b"} and len(seen) <= most
        numbers = [int(text.split()[0][1:]) for text in seen]
        assert max(numbers) < 2500 if most == 100 else max(numbers) > 3990
