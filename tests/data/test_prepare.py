"""From files to a corpus: what is made, kept, added to, and refused."""

import dataclasses
import gzip
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import read as reading
from data.config import DataConfig, DataError, OnBadRecord, Packing, TokenizerConfig
from data.corpus import open_corpus
from data.documents import Document, digest_of, split_of
from data.inputs import Item
from data.part import shares
from data.prepare import existing, prepare
from data.shards import Shard, ShardWriter
from data.tokenizer import Tokenizer
from tests.data.corpora import RECORDS, contents, lines, local, made, texts_of


@pytest.fixture
def config(tmp_path: Path) -> Iterator[DataConfig]:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(RECORDS))
    yield local(tmp_path, "texts", source_key="meta.set")


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


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 100)
    monkeypatch.setattr("data.shards.SHARD_BYTES", 400)


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
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, small_blocks: None, shards: int
) -> None:
    (tmp_path / "texts" / "b.jsonl.gz").write_bytes(gzip.compress(lines([{"text": f"{i} more"} for i in range(40)])))
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


def test_a_failure_leaves_no_corpus_and_what_was_done_is_gone_on_with(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, small_blocks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts" / "b.jsonl").write_bytes(b"{")
    with pytest.raises(DataError, match="b.jsonl:1"):
        made(config, tokenizer)
    partial = tmp_path / "corpora" / ".mine.partial"
    assert not Path(config.path).exists() and (partial / "journal-000.json").exists()
    skipping = dataclasses.replace(config, on_bad_record=OnBadRecord.skip)
    settings = TokenizerConfig(model=str(tokenizer.path), vocab_size=1200)
    firsts: list[int] = []
    _, bad = prepare(skipping, settings, workers=1, on_progress=lambda counts: firsts.append(counts.documents))
    assert firsts[0] > 50 and bad.count == 1 and "b.jsonl:1" in bad.places[0]
    (tmp_path / "texts" / "b.jsonl").unlink()
    other = dataclasses.replace(config, path=config.path + "2")
    made(other, tokenizer)
    assert contents(config.path) == contents(other.path)
    assert "removed" not in capsys.readouterr().out


def test_what_other_settings_or_another_text_left_is_not_gone_on_with(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, small_blocks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts" / "b.jsonl").write_bytes(b"{")
    for change in ("settings", "text"):
        with pytest.raises(DataError, match="b.jsonl:1"):
            made(config, tokenizer)
        if change == "settings":
            config = dataclasses.replace(config, valid_seed=7)
        else:
            (tmp_path / "texts" / "a.jsonl").write_bytes(lines(RECORDS[1:]))
    (tmp_path / "texts" / "b.jsonl").unlink()
    made(config, tokenizer)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and "data.valid_seed (42, now 7)" in told[0] and "another" in told[1] and "a.jsonl" in told[1]
    other = dataclasses.replace(config, path=config.path + "2")
    made(other, tokenizer)
    assert contents(config.path) == contents(other.path)


def test_a_full_disk_leaves_nothing_that_looks_like_a_corpus(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(writer: ShardWriter) -> None:
        writer.close_files()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("data.shards.ShardWriter.close", full)
        with pytest.raises(OSError, match="No space left"):
            made(config, tokenizer)
    assert [path.name for path in (tmp_path / "corpora").iterdir()] == [".mine.partial"]
    made(config, tokenizer)
    assert [path.name for path in (tmp_path / "corpora").iterdir()] == ["mine"]


def test_files_that_came_since_are_added_when_asked_and_the_rest_is_not_touched(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    made(config, tokenizer)
    before = contents(config.path)
    settings = TokenizerConfig(model=str(tokenizer.path), vocab_size=1200)
    (tmp_path / "texts" / "b.jsonl").write_bytes(
        lines([{"text": f"new {i}", "meta": {"set": "new"}} for i in range(30)])
    )
    with pytest.raises(
        DataError, match=r"1 files of data.input came after .* b.jsonl first; pass add=true|b.jsonl first"
    ):
        existing(config, settings)
    assert not existing(config, settings, add=True)
    parts = open_corpus(config, vocab_size=1200).parts
    about = made(config, tokenizer, add=True)
    assert existing(config, settings) and about["splits"]["train"]["new"]["documents"] > 10
    after = contents(config.path)
    assert all(after[name] == content for name, content in before.items() if name != "corpus.json")
    corpus = open_corpus(config, vocab_size=1200)
    assert set(parts) < set(corpus.parts) and "new" in corpus.sources
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(RECORDS[1:]))
    with pytest.raises(DataError, match=r"a.jsonl has \d+ bytes and had \d+ when"):
        existing(config, settings)


def test_what_is_held_out_whole_is_not_trained_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(RECORDS))
    (tmp_path / "held.jsonl").write_bytes(lines([{"text": "only held out"}, RECORDS[7]]))
    config = local(tmp_path, "texts", valid_input=str(tmp_path / "held.jsonl"))
    with pytest.raises(DataError, match=r"a.jsonl:8: is in the validation split as well"):
        made(config, tokenizer)
    about = made(dataclasses.replace(config, on_bad_record=OnBadRecord.skip), tokenizer)
    assert about["splits"]["train"]["mine"]["documents"] == len(RECORDS) - 1
    assert about["splits"]["valid"]["mine"]["documents"] == 2


def test_a_tokenizer_without_the_asked_for_token_is_refused(
    config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.prepare.load_tokenizer", lambda path: _without_eos(tokenizer))
    with pytest.raises(DataError, match=r"tokenizer.add_eos \(true\): .* has no such token"):
        made(config, tokenizer)


def _without_eos(tokenizer: Tokenizer) -> Tokenizer:
    other = type(tokenizer)(tokenizer.path)  # type: ignore[call-arg]
    other.eos_id = None
    return other


def tampered(config: DataConfig, change: str) -> None:
    folder = Path(config.path)
    match change:
        case "tokenizer":
            path = folder / "tokenizer" / "tokenizer.model"
            path.write_bytes(path.read_bytes() + b"\xc0\x3e\x01")
        case "corpus.json":
            (folder / "corpus.json").write_text("{}")
        case "bin":
            path = next((folder / "train").glob("*.bin"))
            path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("change", "vocab_size", "sentence"),
    [
        ("none", 1199, r"has 1200 pieces, more than model.vocab_size \(1199\); pass model.vocab_size=1280"),
        ("tokenizer", 1200, "is not the tokenizer that .* was made with"),
        ("corpus.json", 1200, "does not describe a corpus"),
        ("bin", 1200, "it was cut short or changed"),
    ],
)
def test_an_unfit_corpus_is_told_when_opened(
    config: DataConfig, tokenizer: Tokenizer, change: str, vocab_size: int, sentence: str
) -> None:
    made(config, tokenizer)
    tampered(config, change)
    with pytest.raises(DataError, match=sentence):
        open_corpus(config, vocab_size=vocab_size)


def test_missing_and_too_little_data_are_told(config: DataConfig, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="run: python prepare_data.py data=mine"):
        open_corpus(config, vocab_size=1200)
    made(config, tokenizer)
    with pytest.raises(DataError, match=r"none of its sources fills one pack of 100000"):
        open_corpus(dataclasses.replace(config, seq_len=100_000, packing=Packing.internlm), vocab_size=1200)
    with pytest.raises(DataError, match=r"data.mix.en: there is no such source; choose from c\+\+, wikipedia_en"):
        open_corpus(dataclasses.replace(config, mix={"en": 1.0}), vocab_size=1200)


def test_a_changed_corpus_has_another_fingerprint(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    made(config, tokenizer)
    before = open_corpus(config, vocab_size=1200).fingerprint
    assert open_corpus(config, vocab_size=1200).fingerprint == before
    shutil.rmtree(config.path)
    (tmp_path / "texts" / "b.jsonl").write_bytes(lines([{"text": "more text"}]))
    made(config, tokenizer)
    assert open_corpus(config, vocab_size=1200).fingerprint != before


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
