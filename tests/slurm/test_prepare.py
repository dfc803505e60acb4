"""One corpus prepared by jobs on a real Slurm: the bytes of one process, and what a killed task leaves is gone on with."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.corpora import ROOT, contents, lines
from tests.slurm.cluster import why_not

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(why_not()), reason=why_not() or "installed")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and what the parts of them are when they are prepared on this machine, one after another."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "texts").mkdir()
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=6)) for _ in range(50_000)]
    for name in "abc":
        records = [{"text": " ".join(draw.choices(words, k=900))} for _ in range(1000)]
        (root / "texts" / f"{name}.jsonl").write_bytes(lines(records))
    done = subprocess.run(command(root, "local"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root


def command(root: Path, name: str, *more: str) -> list[str]:
    settings = ["shards=2", "workers=1", "tokenizer.vocab_size=600", "tokenizer.train_bytes=300000", *more]
    places = [f"data.input={root / 'texts'}", f"data.path={root / name}", f"hydra.sweep.dir={root / 'jobs' / name}"]
    return [sys.executable, "prepare_data.py", "data=local", *places, *settings]


SLURM = ("launcher=slurm", "launcher.poll_s=0.5")


def until(done: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def holder_of(lock: Path) -> int | None:
    """Give the process that holds a lock: all nodes are this machine."""
    if not lock.exists():
        return None
    held = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return next((int(words[4]) for words in held if words[5].endswith(f":{lock.stat().st_ino}")), None)


def test_tasks_of_slurm_make_the_bytes_of_one_machine(corpus: Path) -> None:
    done = subprocess.run(command(corpus, "slurm", *SLURM), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is submitted: ") == 2 and done.stdout.count("split  source") == 1
    assert contents(corpus / "slurm") == contents(corpus / "local")
    again = subprocess.run(command(corpus, "slurm", *SLURM), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("it is used as it is") == 2


def test_what_a_killed_task_leaves_is_gone_on_with_by_the_same_command(corpus: Path) -> None:
    run = subprocess.Popen(
        command(corpus, "killed", *SLURM, "save_every_s=0.1"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    journal = corpus / ".killed.partial" / "journal-001.json"
    until(journal.exists)
    task = holder_of(corpus / ".killed.part-1.lock")
    assert task is not None
    os.kill(task, signal.SIGKILL)
    _, told = run.communicate(timeout=120)
    assert run.returncode == 1 and "error: 1 of 2 points did not finish: shard=1" in told
    until(lambda: not subprocess.check_output(["squeue", "--noheader"]))  # what answered is still ending
    left = json.loads(journal.read_text())
    assert not left["complete"] and left["counts"]["documents"] > 0 and not (corpus / "killed").exists()
    done = subprocess.run(command(corpus, "killed", *SLURM), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(corpus / "killed") == contents(corpus / "local") and "removed" not in done.stdout
