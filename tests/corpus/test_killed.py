"""Whenever a run is killed, the next one goes on and the bytes are the same."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from data.tokenizer import Tokenizer
from tests.corpora import PACKED, ROOT, contents, lines, parquet

KILLED = """
import sys, time
from pathlib import Path
from corpus import read, shards
from data.config import DataConfig, Source, TokenizerConfig
from corpus.prepare import prepare
read.BLOCK_BYTES, shards.SHARD_BYTES = 2000, 9000
text, path, tokenizer, workers = sys.argv[1:]
data = DataConfig(name="mine", path=path, source=Source.local, input=text, source_key="set", valid_fraction=0.1,
                  seq_len=8, micro_batch_size=1)
def on_progress(counts):
    print(counts.documents, flush=True)
    time.sleep(0.004)
prepare(data, TokenizerConfig(model=tokenizer, vocab_size=1), workers=int(workers), on_progress=on_progress, save_every_s=0.01)
"""


def test_a_run_that_is_killed_at_any_moment_goes_on_and_makes_the_same_bytes(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    draw = random.Random(0)
    (tmp_path / "texts").mkdir()
    for name in ("a.jsonl", "b.jsonl.gz", "c.txt", "d.jsonl.zst", "e.parquet"):
        records = [{"text": f"{i} " + "some words " * draw.randrange(60), "set": f"s{i % 3}"} for i in range(250)]
        pack = PACKED["." + name.split(".")[2]] if name.count(".") == 2 else bytes
        (tmp_path / "texts" / name).write_bytes(pack(parquet(records) if ".parquet" in name else lines(records)))

    def start(path: str, workers: int) -> subprocess.Popen[str]:
        arguments = [str(tmp_path / "texts"), str(tmp_path / path), str(tokenizer.path), str(workers)]
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    whole = start("whole", 1)
    printed = whole.communicate(timeout=100)[0].split()
    assert whole.returncode == 0 and len(printed) > 100
    kills = 0
    while not (tmp_path / "killed").exists():
        run = start("killed", 2 if kills == 3 else 1)
        assert run.stdout is not None
        first = run.stdout.readline()
        time.sleep(draw.uniform(0, 0.08))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        run.stdout.close()
        kills += 1
        if kills >= 20:
            assert first == "" or int(first) > 1, "it goes on from where it was killed"
            last = start("killed", 1)
            assert last.communicate(timeout=100)[0] is not None and last.returncode == 0
    assert kills >= 20, "it was done before it was killed so often: make the text longer"
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def test_workers_end_with_a_main_process_that_is_killed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    records = [{"text": f"{i} " + "some words " * 40, "set": "s"} for i in range(4000)]
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(records))
    arguments = [str(tmp_path / "texts"), str(tmp_path / "killed"), str(tokenizer.path), "2"]
    run = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline()
    workers = psutil.Process(run.pid).children(recursive=True)
    assert len(workers) >= 2
    run.kill()
    run.wait()
    run.stdout.close()
    assert psutil.wait_procs(workers, timeout=60)[1] == []
