"""Whenever and however the work stops, the next run goes on and makes the same bytes."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from corpus import units
from corpus.config import DataError, OnBadRecord
from data.config import DataConfig
from data.shards import ShardWriter
from data.tokenizer import Tokenizer
from tests.corpora import PACKED, RECORDS, ROOT, contents, lines, local, made, parquet

pytestmark = pytest.mark.usefixtures("small_units")

KILLED = """
import sys, time
from corpus import merge, units
from corpus.config import Source, TokenizerConfig
from corpus.prepare import prepare
from data.config import DataConfig
units.LEAST_UNIT_BYTES, units.BATCH_BYTES, merge.SHARD_BYTES = 4000, 2000, 9000
text, path, tokenizer, workers = sys.argv[1:]
data = DataConfig(name="mine", path=path, source=Source.local, input=text, source_key="set", valid_fraction=0.1,
                  seq_len=8, micro_batch_size=1)
def progress(*added):
    print(added[0], flush=True)
    time.sleep(0.004)
prepare(data, TokenizerConfig(model=tokenizer, vocab_size=1), workers=int(workers), progress=progress)
"""


def start(tmp_path: Path, tokenizer: Tokenizer, path: str, workers: int) -> subprocess.Popen[str]:
    arguments = [str(tmp_path / "texts"), str(tmp_path / path), str(tokenizer.path), str(workers)]
    command = [sys.executable, "-c", KILLED, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_run_killed_at_any_moment_goes_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    draw = random.Random(0)
    (tmp_path / "texts").mkdir()
    for name in ("a.jsonl", "b.jsonl.gz", "c.txt", "d.jsonl.zst", "e.parquet"):
        records = [{"text": f"{i} " + "some words " * draw.randrange(60), "set": f"s{i % 3}"} for i in range(250)]
        pack = PACKED["." + name.split(".")[2]] if name.count(".") == 2 else bytes
        (tmp_path / "texts" / name).write_bytes(pack(parquet(records) if ".parquet" in name else lines(records)))
    whole = start(tmp_path, tokenizer, "whole", 1)
    printed = whole.communicate(timeout=200)[0].split()
    assert whole.returncode == 0 and len(printed) > 100
    kills = resumed = 0
    while not (tmp_path / "killed").exists() and kills < 20:
        run = start(tmp_path, tokenizer, "killed", 2 if kills == 3 else 1)
        assert run.stdout is not None
        first = run.stdout.readline()
        resumed += (tmp_path / ".killed.partial" / "units" / "000000").exists() and first != ""
        time.sleep(draw.uniform(0, 0.08))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        run.stdout.close()
        kills += 1
    assert kills >= 20, "it was done before it was killed so often: make the text longer"
    assert resumed > 5
    assert start(tmp_path, tokenizer, "killed", 1).communicate(timeout=200)[0] is not None
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def test_workers_end_with_a_killed_main_process(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    records = [{"text": f"{i} " + "some words " * 40, "set": "s"} for i in range(4000)]
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(records))
    run = start(tmp_path, tokenizer, "killed", 2)
    assert run.stdout is not None and run.stdout.readline()
    workers = psutil.Process(run.pid).children(recursive=True)
    assert len(workers) >= 2
    run.kill()
    run.wait()
    run.stdout.close()
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
    config: DataConfig,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "texts" / "b.jsonl").write_bytes(b"{")
    with pytest.raises(DataError, match="b.jsonl:1"):
        made(config, tokenizer)
    done = units_done(config)
    assert not Path(config.path).exists() and len(done) > 5 and all(name.isdigit() for name in done)
    original, written = units.UnitWorker.write, []
    monkeypatch.setattr(units.UnitWorker, "write", lambda self, unit: (written.append(unit), original(self, unit)))
    skipping = dataclasses.replace(config, on_bad_record=OnBadRecord.skip)
    about = made(skipping, tokenizer)
    assert len(written) == 1 and about["left_out"]["count"] == 1 and "b.jsonl:1" in about["left_out"]["places"][0]
    (tmp_path / "texts" / "b.jsonl").unlink()
    check_whole(config, tokenizer)
    assert "removing" not in capsys.readouterr().out


@pytest.mark.parametrize("change", ["settings", "text", "files"])
def test_other_work_begins_anew(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    (tmp_path / "texts" / "z.jsonl").write_bytes(b"{")
    with pytest.raises(DataError, match="z.jsonl:1"):
        made(config, tokenizer)
    (tmp_path / "texts" / "z.jsonl").write_bytes(b"")
    if change == "settings":
        config.valid_seed = 7
    elif change == "text":
        (tmp_path / "texts" / "a.jsonl").write_bytes(lines(RECORDS[1:]))
    else:
        (tmp_path / "texts" / "0.jsonl").write_bytes(lines([{"text": "first in order"}]))
    made(config, tokenizer)
    printed = capsys.readouterr().out
    assert ("data.valid_seed (42, now 7)" if change == "settings" else "other input files") in printed
    check_whole(config, tokenizer)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["corpus.units._append", "data.shards.ShardWriter.close"])
def test_stop_leaves_nothing_that_looks_like_a_corpus(
    config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    def fail(first: Any, *rest: Any) -> None:
        if isinstance(first, ShardWriter):
            first.file.close()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(call, fail)
        with pytest.raises(type(error)):
            made(config, tokenizer)
    assert not Path(config.path).exists() and all(name.isdigit() for name in units_done(config))
    made(config, tokenizer)
    assert sorted(path.name for path in Path(config.path).parent.iterdir()) == [".mine.lock", "mine"]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("number", range(0, 12, 3))
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
    original, count = Path.rename, 0

    def stopped(path: Path, target: Path) -> Path:
        nonlocal count
        if not path.name.startswith("."):
            pass
        elif "corpus.json" in path.name or path.name == ".mine.partial":
            count += 1
        count += path.parent.name in ("train", "valid") or path.name == "corpus.json"
        if count > (number if add else number // 6):
            raise KeyboardInterrupt
        return original(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stopped)
        with pytest.raises(KeyboardInterrupt):
            made(config, tokenizer, add=add)
    monkeypatch.setattr("corpus.units.UnitWorker.write", lambda *arguments: pytest.fail("it begins anew"))
    assert made(config, tokenizer, add=add) is not None
    assert contents(config.path) == contents(whole.path)
    assert not (tmp_path / "corpora" / ".mine.partial").exists()


def test_damaged_unit_is_done_again(config: DataConfig, tokenizer: Tokenizer) -> None:
    made(config, tokenizer, shards=2, shard=0)
    tokens = next(Path(config.path).with_name(".mine.partial").glob("units/000000/*.tokens"))
    tokens.write_bytes(bytes(tokens.stat().st_size))
    with pytest.raises(DataError, match="damaged"):
        made(config, tokenizer, shards=2, shard=1)
    assert made(config, tokenizer) is not None
    check_whole(config, tokenizer)


def test_corpus_that_another_process_prepares_is_left_to_it(config: DataConfig, tokenizer: Tokenizer) -> None:
    Path(config.path).parent.mkdir()
    with FileLock(Path(config.path).with_name(".mine.lock")), pytest.raises(DataError, match="another process"):
        made(config, tokenizer)


def test_unit_that_another_process_wrote_is_kept(
    config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two jobs with the same number do the same work twice and no harm."""
    monkeypatch.setattr(units, "read_unit", lambda folder, number: None)
    monkeypatch.setattr("corpus.merge.read_unit", lambda folder, number: None)
    for _ in range(2):
        assert made(config, tokenizer, shards=2, shard=0) is None
    assert all(name.isdigit() for name in units_done(config))


def test_killed_worker_is_an_error_and_the_work_goes_on(config: DataConfig, tokenizer: Tokenizer) -> None:
    killed: list[psutil.Process] = []

    def kill_one(*added: int) -> None:
        if not killed:
            workers = (c for c in psutil.Process().children() if "resource_tracker" not in " ".join(c.cmdline()))
            killed.append(next(workers))
            killed[0].kill()

    with pytest.raises(DataError, match="worker process was killed"):
        made(config, tokenizer, workers=2, progress=kill_one)
    made(config, tokenizer)
    check_whole(config, tokenizer)


def test_error_in_a_worker_is_raised(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "texts" / "b.jsonl").write_bytes(b"{")
    with pytest.raises(DataError, match="b.jsonl:1"):
        made(config, tokenizer, workers=2)


def test_left_out_is_reported_once_whatever_shards_and_stops(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines([{"body": "x"}]) * 12 + lines([{"text": " "}]))
    config = local(tmp_path, "texts", on_bad_record=OnBadRecord.skip)
    with pytest.raises(DataError, match=r"data.source \(local\) has no training document: 12 bad records, .*a.jsonl:1"):
        made(config, tokenizer)
    (tmp_path / "texts" / "b.jsonl").write_bytes(lines([{"text": f"text {i}"} for i in range(20)]))
    (tmp_path / "texts" / "c.jsonl").write_bytes((tmp_path / "texts" / "b.jsonl").read_bytes())

    def stop(*added: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(config, tokenizer, progress=stop)
    for shard in (2, 0, 1):
        about = made(config, tokenizer, shards=3, shard=shard)
    left_out = about["left_out"]
    assert (left_out["count"], left_out["empty"], left_out["duplicates"]) == (12, 1, 20)
    assert len(left_out["places"]) == 10
