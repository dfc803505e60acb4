"""One corpus prepared by jobs on a real Slurm: the bytes of one process."""

import random
from pathlib import Path

import pytest

from tests.conftest import ran
from tests.corpora import contents, lines
from tests.slurm.cluster import why_not

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(why_not()), reason=why_not() or "installed")]


def test_slurm_tasks_make_the_bytes_of_one_machine(tmp_path: Path) -> None:
    draw, texts = random.Random(0), tmp_path / "texts"
    texts.mkdir()
    words = ["".join(draw.choices("abcdefghij", k=6)) for _ in range(5000)]
    for name in "abc":
        records = [{"text": " ".join(draw.choices(words, k=900))} for _ in range(100)]
        (texts / f"{name}.jsonl").write_bytes(lines(records))

    def prepared(name: str, *more: str) -> str:
        settings = ["shards=2", "workers=1", "tokenizer.vocab_size=600", "tokenizer.train_bytes=300000", *more]
        places = [f"data.input={texts}", f"data.path={tmp_path / name}", f"hydra.sweep.dir={tmp_path / 'jobs' / name}"]
        return ran("prepare_data.py", "data=local", *places, *settings).stdout

    prepared("local")
    slurm = ("slurm", "launcher=slurm", "launcher.poll_s=0.5")
    printed = prepared(*slurm)
    assert printed.count("is submitted: ") == 2 and printed.count("split  source") == 1
    assert contents(tmp_path / "slurm") == contents(tmp_path / "local")
    assert prepared(*slurm).count("was prepared before") == 2
