"""One corpus prepared by jobs on a real Slurm: the bytes of one process, also after a task was killed."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ran
from tests.corpora import ROOT, contents, lines
from tests.slurm.cluster import until, why_not

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(why_not()), reason=why_not() or "installed")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and the corpus that two shards make of them on this machine, one after the other."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "texts").mkdir()
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=6)) for _ in range(50_000)]
    for name in "abc":
        records = [{"text": " ".join(draw.choices(words, k=900))} for _ in range(1000)]
        (root / "texts" / f"{name}.jsonl").write_bytes(lines(records))
    ran(*command(root, "local"))
    return root


def command(root: Path, name: str, *more: str) -> list[str]:
    settings = ["shards=2", "workers=1", "tokenizer.vocab_size=600", "tokenizer.train_bytes=300000", *more]
    places = [f"data.input={root / 'texts'}", f"data.path={root / name}", f"hydra.sweep.dir={root / 'jobs' / name}"]
    return ["prepare_data.py", "data=local", *places, *settings]


SLURM = ("launcher=slurm", "launcher.poll_s=0.5")


def test_slurm_tasks_make_the_bytes_of_one_machine(corpus: Path) -> None:
    done = ran(*command(corpus, "slurm", *SLURM))
    assert done.stdout.count("is submitted: ") == 2 and done.stdout.count("split  source") == 1
    assert contents(corpus / "slurm") == contents(corpus / "local")
    assert ran(*command(corpus, "slurm", *SLURM)).stdout.count("was prepared before") == 2


def test_killed_task_goes_on_with_the_same_command(corpus: Path) -> None:
    argv = [sys.executable, *command(corpus, "killed", *SLURM)]
    run = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    units = corpus / ".killed.partial" / "units"
    until(lambda: any(units.glob(".000001.*")))
    os.kill(int(next(units.glob(".000001.*")).name.split(".")[-1]), signal.SIGKILL)  # all nodes are this machine
    _, printed = run.communicate(timeout=120)
    assert run.returncode == 1 and "shard=1" in printed
    until(lambda: not subprocess.check_output(["squeue", "--noheader"]))  # the other task is still ending
    assert not (units / "000001").exists() and (units / "000000").exists() and not (corpus / "killed").exists()
    done = ran(*argv[1:])
    assert contents(corpus / "killed") == contents(corpus / "local") and "removing" not in done.stdout
