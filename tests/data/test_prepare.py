"""From files to a corpus: what is made, kept, added to, and refused."""

import dataclasses
import fcntl
import gzip
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import read as reading
from data.config import DataConfig, DataError, OnBadRecord, TokenizerConfig
from data.corpus import open_corpus
from data.documents import Document, digest_of, split_of
from data.inputs import Item
from data.part import shares
from data.prepare import existing, prepare
from data.shards import Shard, ShardWriter
from data.tokenizer import Tokenizer
from tests.data.corpora import RECORDS, contents, lines, local, made, texts_of


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
    config: DataConfig,
    tokenizer: Tokenizer,
    tmp_path: Path,
    small_blocks: None,
    monkeypatch: pytest.MonkeyPatch,
    shards: int,
) -> None:
    (tmp_path / "texts" / "b.jsonl.gz").write_bytes(gzip.compress(lines([{"text": f"{i} more"} for i in range(40)])))
    monkeypatch.setattr(reading, "TEXT_BYTES", 300)
    monkeypatch.setattr("data.long.PIECE_CHARS", 200)
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


@pytest.mark.parametrize(
    ("add", "call", "number"),
    [(False, "unlink", 0), (False, "rename", 0), (True, "unlink", 1), (True, "rename", 0), (True, "rename", 4)],
)
def test_a_commit_that_was_interrupted_is_finished(
    config: DataConfig,
    tokenizer: Tokenizer,
    tmp_path: Path,
    small_blocks: None,
    monkeypatch: pytest.MonkeyPatch,
    add: bool,
    call: str,
    number: int,
) -> None:
    whole = dataclasses.replace(config, path=config.path + "2")
    if add:
        for each in (config, whole):
            made(each, tokenizer)
        (tmp_path / "texts" / "b.jsonl").write_bytes(lines([{"text": f"new {i}"} for i in range(90)]))
    made(whole, tokenizer, add=add)
    original, folder, count = getattr(Path, call), Path(config.path), 0

    def stopped(path: Path, *arguments: Any, **options: Any) -> Any:
        nonlocal count
        moved = call == "rename" and (arguments[0] == folder or folder in arguments[0].parents)
        if moved or path.name.startswith("journal-") or path.name == "plan.json":
            count += 1
            if count > number:
                raise KeyboardInterrupt
        return original(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, stopped)
        with pytest.raises(KeyboardInterrupt):
            made(config, tokenizer, add=add)
    assert (tmp_path / "corpora" / ".mine.partial" / "corpus.json").exists()
    monkeypatch.setattr("data.part.encoded", lambda *arguments, **options: pytest.fail("it begins anew"))
    assert made(config, tokenizer, add=add) is not None
    assert contents(config.path) == contents(whole.path)
    assert not (tmp_path / "corpora" / ".mine.partial").exists()


def test_an_input_that_came_or_went_begins_the_work_anew(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts" / "z.jsonl").write_bytes(b"{")
    with pytest.raises(DataError, match="z.jsonl:1"):
        made(config, tokenizer)
    (tmp_path / "texts" / "0.jsonl").write_bytes(lines([{"text": "first in order"}]))
    (tmp_path / "texts" / "1.jsonl").write_bytes(lines([{"text": "second"}]))
    about = made(dataclasses.replace(config, on_bad_record=OnBadRecord.skip), tokenizer)
    assert "is removed, because it was made with 2 inputs, now 4" in capsys.readouterr().out
    assert sum(s["documents"] for split in about["splits"].values() for s in split.values()) == len(RECORDS) + 2


def test_what_is_bad_is_told_once_by_whichever_parts_and_after_a_stop(
    tokenizer: Tokenizer, tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "TEXT_BYTES", 300)
    (tmp_path / "texts").mkdir()
    long = b'{"text": ' + b"1" * 700 + b" 2}\n"
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(RECORDS[:20]) + long + lines(RECORDS[20:]))
    (tmp_path / "texts" / "b.jsonl.gz").write_bytes(gzip.compress(long + lines(RECORDS), 0)[:-6])
    config = local(tmp_path, "texts", on_bad_record=OnBadRecord.skip)
    settings = TokenizerConfig(model=str(tokenizer.path), vocab_size=1200)
    options: Any = {"workers": 1, "on_progress": lambda counts: None}
    _, bad = prepare(config, settings, **options)
    assert bad.count == 3 and "damaged or cut short" in bad.places[2]
    parts = dataclasses.replace(config, path=config.path + "2")
    told = [prepare(parts, settings, shards=5, shard=shard, **options)[1].places for shard in range(5)]
    assert sorted(place for places in told for place in places) == sorted(bad.places)

    def stop(counts: Any) -> None:
        if counts.documents > 70:
            raise KeyboardInterrupt

    again = dataclasses.replace(config, path=config.path + "3")
    with pytest.raises(KeyboardInterrupt):
        prepare(again, settings, workers=1, on_progress=stop)
    assert prepare(again, settings, **options)[1].places == bad.places


def test_work_that_others_are_at_is_not_removed(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, small_blocks: None
) -> None:
    made(config, tokenizer, shards=2, shard=0)
    lock = tmp_path / "corpora" / ".mine.part-1.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"1 other processes prepare .*/mine with shards \(2, now 3\)"):
            made(config, tokenizer, shards=3, shard=0)
        with pytest.raises(DataError, match=r"mine is being prepared by another process; wait for it"):
            made(config, tokenizer, shards=2, shard=1)
    lock.unlink(missing_ok=True)
    assert made(config, tokenizer, shards=2, shard=1) is not None


def test_a_long_document_that_is_held_out_is_not_trained_on(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "TEXT_BYTES", 300)
    monkeypatch.setattr("data.long.PIECE_CHARS", 200)
    long = "".join(record["text"] for record in RECORDS)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines([{"text": "x"}, {"text": long}, {"text": "y"}]))
    (tmp_path / "held.jsonl").write_bytes(lines([{"text": long}]))
    config = local(tmp_path, "texts", valid_input=str(tmp_path / "held.jsonl"))
    with pytest.raises(DataError, match=r"a.jsonl:2: is in the validation split as well"):
        made(config, tokenizer)
    about = made(dataclasses.replace(config, on_bad_record=OnBadRecord.skip), tokenizer)
    assert about["splits"]["train"]["mine"]["documents"] == 2 and about["splits"]["valid"]["mine"]["documents"] == 1


def test_a_tokenizer_of_a_large_corpus_is_trained_on_the_beginning_of_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    for name in "ab":
        records = [{"text": f"{name}{i} some words of a text that goes on"} for i in range(4000)]
        (tmp_path / "texts" / f"{name}.jsonl").write_bytes(lines(records))
    monkeypatch.setattr(reading, "BLOCK_BYTES", 5000)
    monkeypatch.setattr("data.prepare.LEAST_SAMPLE", 10_000)
    seen: list[str] = []

    def train(texts: Iterator[str], path: Path, **options: Any) -> None:
        seen.extend(texts)
        raise KeyboardInterrupt

    monkeypatch.setattr("data.prepare.train_tokenizer", train)
    for limit, most in ((1_000_000, 8000), (2_000, 100)):
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            settings = TokenizerConfig(vocab_size=500, train_bytes=limit)
            prepare(local(tmp_path, "texts"), settings, workers=1, on_progress=lambda counts: None)
        assert {text[0] for text in seen} == {"a", "b"} and len(seen) <= most
        numbers = [int(text.split()[0][1:]) for text in seen]
        assert max(numbers) < 2500 if most == 100 else max(numbers) > 3990
