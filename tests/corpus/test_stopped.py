"""Whenever and however the work stops, the next run goes on and makes the same bytes."""

import dataclasses
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
from filelock import FileLock

from corpus import units
from corpus.config import DataError, OnBadRecord
from data.config import DataConfig
from data.tokenizer import Tokenizer
from tests.corpora import PACKED, RECORDS, contents, lines, local, made, parquet, write

pytestmark = pytest.mark.usefixtures("small_units")


@pytest.fixture
def many_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Some hundred units in files of several kinds."""
    monkeypatch.setattr(units, "LEAST_UNIT_BYTES", 1500)
    monkeypatch.setattr("corpus.merge.SHARD_BYTES", 9000)
    draw = random.Random(0)
    for name in ("a.jsonl", "b.jsonl.gz", "c.txt", "d.jsonl.zst", "e.parquet"):
        records = [{"text": f"{i} " + "some words " * draw.randrange(60), "set": f"s{i % 3}"} for i in range(250)]
        pack = PACKED["." + name.split(".")[2]] if name.count(".") == 2 else bytes
        write(tmp_path / "texts", {name: pack(parquet(records) if ".parquet" in name else lines(records))})
    return local(tmp_path, "texts", source_key="set", valid_fraction=0.1)


def start(config: DataConfig, tokenizer: Tokenizer, workers: int = 1) -> tuple[Any, Any]:
    """Prepare a corpus in another process; return it and what it reports after each unit."""
    context = multiprocessing.get_context("fork")
    reports, mine = context.Pipe(duplex=False)

    def progress(*added: Any) -> None:
        mine.send(added)
        time.sleep(0.004 * bool(added[2]))  # not for those of an earlier run

    process = context.Process(target=made, args=(config, tokenizer, workers), kwargs={"progress": progress})
    process.start()
    mine.close()
    return process, reports


def test_kills_at_any_moment(many_texts: DataConfig, tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    kills = resumed = 0
    while not Path(many_texts.path).exists() and kills < 15:
        process, reports = start(many_texts, tokenizer)
        resumed += reports.recv()[2] == 0
        time.sleep(draw.uniform(0, 0.06))
        process.kill()
        process.join()
        reports.close()
        kills += 1
    assert resumed > 5, "it was done before it was killed so often: make the text longer"
    assert made(many_texts, tokenizer)["units"] > 80
    check_whole(many_texts, tokenizer)


def test_workers_end_with_a_killed_main_process(many_texts: DataConfig, tokenizer: Tokenizer) -> None:
    process, reports = start(many_texts, tokenizer, 2)
    reports.recv()
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.join()
    reports.close()
    assert psutil.wait_procs(workers, timeout=60)[1] == []


def check_whole(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Compare a corpus with one that was made without a stop."""
    whole = dataclasses.replace(config, path=config.path + "2")
    made(whole, tokenizer)
    assert contents(config.path) == contents(whole.path)


def units_done(config: DataConfig) -> list[str]:
    folder = Path(config.path)
    return sorted(path.name for path in folder.with_name(f".{folder.name}.partial").glob("units/*"))


def test_failure_keeps_finished_units(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts" / "b.jsonl").write_bytes(b"{")
    with pytest.raises(DataError, match="b.jsonl:1"):
        made(config, tokenizer)
    done = units_done(config)
    assert not Path(config.path).exists() and len(done) > 5 and all(name.isdigit() for name in done)
    skipping, added = dataclasses.replace(config, on_bad_record=OnBadRecord.skip), []
    about = made(skipping, tokenizer, progress=lambda *counts: added.append(counts))
    assert [text_bytes for _, _, text_bytes, _ in added] == [0] * about["units"], "an earlier run's, and one of nothing"
    assert about["left_out"]["count"] == 1 and "b.jsonl:1" in about["left_out"]["places"][0]
    (tmp_path / "texts" / "b.jsonl").unlink()
    check_whole(config, tokenizer)
    assert "removing" not in capsys.readouterr().out


@pytest.mark.parametrize("change", ["settings", "text"])
def test_other_settings_or_text_begin_anew(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    (tmp_path / "texts" / "z.jsonl").write_bytes(b"{")
    with pytest.raises(DataError, match="z.jsonl:1"):
        made(config, tokenizer)
    (tmp_path / "texts" / "z.jsonl").write_bytes(b"")
    if change == "settings":
        config.valid_seed = 7
    else:
        (tmp_path / "texts" / "a.jsonl").write_bytes(lines(RECORDS[1:]))
    made(config, tokenizer)
    printed = capsys.readouterr().out
    assert ("data.valid_seed (42, now 7)" if change == "settings" else "other input files") in printed
    check_whole(config, tokenizer)


@pytest.mark.parametrize("call", ["corpus.units._append", "data.shards.ShardWriter.close"])
def test_failed_write_leaves_no_corpus(
    config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    full = Mock(side_effect=OSError(28, "No space left on device"))
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(call, full)
        made(config, tokenizer)
    assert not Path(config.path).exists() and all(name.isdigit() for name in units_done(config))
    made(config, tokenizer)
    assert sorted(path.name for path in Path(config.path).parent.iterdir()) == [".mine.lock", "mine"]


@pytest.mark.parametrize(("add", "number"), [(False, 0), (False, 1), (True, 0), (True, 5), (True, 11)])
def test_interrupted_commit_is_finished(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, add: bool, number: int
) -> None:
    """Stop at one of the renames after the last unit: of corpus.json, of the folder, or of the files in it."""
    whole = dataclasses.replace(config, path=config.path + "2")
    if add:
        for each in (config, whole):
            made(each, tokenizer)
        (tmp_path / "texts" / "b.jsonl").write_bytes(lines([{"text": f"new {i}"} for i in range(90)]))
    made(whole, tokenizer, add=add)
    original, count = os.replace, 0

    def stopped(path: Path, target: Path) -> None:
        nonlocal count
        count += path.parent.name in ("train", "valid") or "corpus.json" in path.name or path.name == ".mine.partial"
        if count > number:
            raise KeyboardInterrupt
        original(path, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", stopped)
        patch.setattr("os.replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            made(config, tokenizer, add=add)
    monkeypatch.setattr("corpus.units.UnitWorker.write", lambda *arguments: pytest.fail("it begins anew"))
    assert made(config, tokenizer, add=add) is not None
    assert contents(config.path) == contents(whole.path)
    assert not (tmp_path / "corpora" / ".mine.partial").exists()


def test_corpus_of_another_process(config: DataConfig, tokenizer: Tokenizer) -> None:
    Path(config.path).parent.mkdir()
    with FileLock(Path(config.path).with_name(".mine.lock")), pytest.raises(DataError, match="another process"):
        made(config, tokenizer)


def test_unit_of_another_process(config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs with the same number do the same work twice and no harm."""
    monkeypatch.setattr(units, "read_unit", lambda folder, number: None)
    monkeypatch.setattr("corpus.merge.read_unit", lambda folder, number: None)
    for _ in range(2):
        assert made(config, tokenizer, shards=2, shard=0) is None
    assert all(name.isdigit() for name in units_done(config))


def test_failed_and_killed_workers(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    killed: list[psutil.Process] = []

    def kill_one(*added: int) -> None:
        if not killed:
            workers = (c for c in psutil.Process().children() if "spawn_main" in " ".join(c.cmdline()))
            killed.append(next(workers))
            killed[0].kill()

    (tmp_path / "texts" / "b.jsonl").write_bytes(b"{")
    with pytest.raises(DataError, match="b.jsonl:1"):
        made(config, tokenizer, workers=2)
    (tmp_path / "texts" / "b.jsonl").unlink()
    shutil.rmtree(Path(config.path).with_name(".mine.partial"))
    with pytest.raises(DataError, match="worker process was killed"):
        made(config, tokenizer, workers=2, progress=kill_one)
    made(config, tokenizer)
    check_whole(config, tokenizer)


def test_left_out_is_counted_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "texts", {"a.jsonl": lines([{"body": "x"}]) * 12 + lines([{"text": " "}])})
    config = local(tmp_path, "texts", on_bad_record=OnBadRecord.skip)
    with pytest.raises(
        DataError, match=r"data.source \(local\) has no training document; bad records: 12, .*a.jsonl:1"
    ):
        made(config, tokenizer)
    write(tmp_path / "texts", dict.fromkeys(["b.jsonl", "c.jsonl"], lines([{"text": f"{i}"} for i in range(20)])))
    with pytest.raises(KeyboardInterrupt):
        made(config, tokenizer, progress=Mock(side_effect=KeyboardInterrupt))
    for shard in (2, 0, 1):
        about = made(config, tokenizer, shards=3, shard=shard)
    left_out = about["left_out"]
    assert (left_out["count"], left_out["empty"], left_out["duplicates"]) == (12, 1, 20)
    assert len(left_out["places"]) == 10
