"""What is left when the work stops, for whatever reason, and what the next run makes of it."""

import dataclasses
import fcntl
import gzip
from pathlib import Path
from typing import Any

import psutil
import pytest

from corpus import read as reading
from corpus.config import DataError, OnBadRecord, TokenizerConfig
from corpus.prepare import prepare
from data.config import DataConfig
from data.shards import ShardWriter
from data.tokenizer import Tokenizer
from tests.corpora import RECORDS, contents, lines, local, made


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
    monkeypatch.setattr("corpus.part.encoded", lambda *arguments, **options: pytest.fail("it begins anew"))
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
    (tmp_path / "texts" / "c.jsonl").write_bytes(b"{}\n")
    config = local(tmp_path, "texts", on_bad_record=OnBadRecord.skip)
    settings = TokenizerConfig(model=str(tokenizer.path), vocab_size=1200)
    options: Any = {"workers": 1, "on_progress": lambda counts: None}
    _, bad = prepare(config, settings, **options)
    assert bad.count == 4 and "damaged or cut short" in bad.places[2] and "c.jsonl:1" in bad.places[3]
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


def test_that_a_worker_was_killed_is_a_sentence_and_the_work_goes_on_from_there(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, small_blocks: None
) -> None:
    settings = TokenizerConfig(model=str(tokenizer.path), vocab_size=1200)
    main = psutil.Process()

    def kill_one(counts: Any) -> None:
        for worker in main.children()[-1:]:
            worker.kill()

    with pytest.raises(
        DataError, match=r"one of the 2 processes that encode was killed, .* run the same again to go on"
    ):
        prepare(config, settings, workers=2, on_progress=kill_one, save_every_s=0)
    firsts: list[int] = []
    prepare(config, settings, workers=1, on_progress=lambda counts: firsts.append(counts.documents))
    other = dataclasses.replace(config, path=config.path + "2")
    made(other, tokenizer)
    assert firsts[0] > 1 and contents(config.path) == contents(other.path)


def test_what_is_left_out_is_told_by_the_corpus_and_where_nothing_is_left(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines([{"body": "x"}]) * 12 + lines([{"text": " "}]))
    config = local(tmp_path, "texts", on_bad_record=OnBadRecord.skip)
    with pytest.raises(
        DataError,
        match=r"no training document in data.source \(local\): 12 bad records were left out, the first .*a.jsonl:1: "
        r"data.text_key \(text\) is missing in it; it has body",
    ):
        made(config, tokenizer)
    (tmp_path / "texts" / "b.jsonl").write_bytes(lines([{"text": f"text {i}"} for i in range(20)]))
    (tmp_path / "texts" / "c.jsonl").write_bytes((tmp_path / "texts" / "b.jsonl").read_bytes())
    for shard in range(3):
        about = made(config, tokenizer, shards=3, shard=shard)
    assert (about["left_out"]["count"], about["left_out"]["empty"], len(about["left_out"]["places"])) == (13, 1, 10)


def test_an_input_of_another_size_begins_the_work_anew(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts divide the work by size: two that saw different ones would both leave something out."""
    (tmp_path / "texts" / "z.jsonl").write_bytes(lines(RECORDS[:20]))
    made(config, tokenizer, shards=2, shard=0)
    (tmp_path / "texts" / "z.jsonl").write_bytes(lines([{"text": f"another {i}"} for i in range(900)]))
    for shard in (1, 0):
        about = made(config, tokenizer, shards=2, shard=shard)
    assert "is removed, because" in capsys.readouterr().out
    assert sum(s["documents"] for split in about["splits"].values() for s in split.values()) == len(RECORDS) + 900


def test_a_run_that_was_killed_as_it_had_noted_that_a_file_is_done_leaves_nothing_behind(
    config: DataConfig, tokenizer: Tokenizer, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(writer: ShardWriter) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "forget", killed)
        with pytest.raises(KeyboardInterrupt):
            made(config, tokenizer, save_every_s=0)
    made(config, tokenizer)
    other = dataclasses.replace(config, path=config.path + "2")
    made(other, tokenizer)
    assert contents(config.path) == contents(other.path)
