"""What is shown of a step is what it trains on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from corpus.config import DataError, Source
from data.batches import IGNORED
from data.config import DataConfig
from data.dataset import Corpus, PackedDataset, open_corpus
from data.packing import Concat
from data.shards import LOSS_MASKED, Shard, ShardWriter
from data.show import main, marked, show, show_pack
from data.tokenizer import Tokenizer
from tests.conftest import ROOT

CONFIG = DataConfig(name="t", path="none", source=Source.local, seq_len=8, micro_batch_size=1, workers=0)


def config_of(corpus_dir: Path) -> DataConfig:
    return DataConfig(
        name="local", path=str(corpus_dir), source=Source.local, seq_len=32, micro_batch_size=2, workers=0
    )  # fmt: skip


def test_a_step_of_a_run_is_shown_with_its_documents(run_dir: Path, corpus_dir: Path) -> None:
    command = [sys.executable, "-m", "data.show", f"run={run_dir}", "step=8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, *packs = done.stdout.split("\n=== ")
    assert head == f"step 8 of {run_dir}: samples 28 to 31, each 32 tokens\n"
    corpus = open_corpus(config_of(corpus_dir), vocab_size=1024)
    assert corpus.tokenizer is not None and len(packs) == 4
    found = corpus.train.locate(np.arange(28, 32))
    batch = corpus.train.batch(found)
    for row, (pack, told) in enumerate(zip(found.tolist(), packs, strict=True)):
        source = corpus.sources[int(batch.source_BT[row, 0])]
        targets = int((batch.labels_BT[row] != IGNORED).sum())
        pieces = corpus.train.pieces(pack)
        assert told.startswith(
            f"sample {28 + row}: pack {pack} of {source}, {len(pieces)} documents, {targets} targets\n"
        )
        texts = ["".join(part.split("\n", 1)[1:]) for part in told.split("\n--- ")[1:] if "of padding" not in part]
        shown = "".join(text.rstrip("\n") for text in texts).replace("⟦", "").replace("⟧", "")
        ids = [token for p in pieces for token in p.file.read(p.start, p.length).tolist()]
        whole = "".join(corpus.tokenizer.decode(ids).split())
        assert "".join(shown.split()) == whole or "\ufffd" in shown + whole  # a character may be cut in two


def test_what_is_read_and_not_learnt_is_in_brackets(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = ShardWriter(tmp_path / "sft", vocab_size=1200, tokenizer="t", masked=True)
    prompt, answer = (np.array(tokenizer.encode(text), dtype=np.uint32) for text in ("Why? ", "Because."))
    ids = np.concatenate([prompt | np.uint32(LOSS_MASKED), answer])
    writer.add(ids, 0)
    writer.close()
    layout = Concat([Shard(tmp_path / "sft")], len(ids) + 3)
    packs = PackedDataset([layout], [0], CONFIG, vocab_size=1200)
    corpus = Corpus(("sft",), ["p"], tokenizer, False, False, None, packs, packs)
    show_pack(corpus, 5, 0)
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"=== sample 5: pack 0 of sft, 1 documents, {len(answer)} targets",
        f"--- {tmp_path}/sft.bin from token 0, {len(ids)} tokens",
        "⟦Why? ⟧Because.",
        "--- 3 tokens of padding",
    ]
    text = np.array(tokenizer.encode("plain text"))
    assert marked(tokenizer, text, np.arange(len(text)) > 0).startswith("⟦")
    assert marked(None, np.array([7, 8, 9]), np.array([False, True, False])) == "⟦7⟧8⟦9⟧"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["step=3"], "run is not set; name a run folder: python -m data.show run=runs/demo step=1234"),
        (["run=nothing", "step=3"], r"run \(nothing\) holds no config.yaml"),
        (["run=nothing", "step=x"], r"step \(x\) must be a whole number from 1 on: "),
        (["run=nothing", "step=0"], r"step \(0\) must be a whole number from 1 on: "),
        (["run=nothing", "stop=3"], "stop is not a setting; there are run, step, samples: "),
    ],
)
def test_what_cannot_be_shown_is_told(arguments: list[str], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        main(arguments)


def test_whoever_reads_the_beginning_alone_sees_no_error(run_dir: Path) -> None:
    command = f"{sys.executable} -m data.show run={run_dir} step=8 | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("step 8 of ") and not done.stderr


def test_a_few_samples_may_be_asked_for(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(run_dir, 1, samples=2)
    assert capsys.readouterr().out.count("=== sample") == 2


def test_that_a_run_has_not_been_at_a_step_is_said(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(run_dir, 8, samples=1)
    assert "has not been" not in capsys.readouterr().out
    show(run_dir, 9999, samples=1)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"{run_dir} has not been at step 9999 yet: it has come to step ")


def test_a_run_whose_data_grew_is_shown_from_there_on(
    run_dir: Path, corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    path = next((tmp_path / "run").glob("checkpoints/step-*[0-9]/state.json"))
    state = json.loads(path.read_text())
    state["progress"]["first_sample"] = 16
    path.write_text(json.dumps(state))
    with pytest.raises(DataError, match="step 4 was before files were added to the data"):
        show(tmp_path / "run", 4)
    show(tmp_path / "run", 5, samples=1)
    corpus = open_corpus(config_of(corpus_dir), vocab_size=1024)
    corpus.train.begin_at(16)
    (pack,) = corpus.train.locate(np.array([16])).tolist()
    assert f"=== sample 16: pack {pack} of " in capsys.readouterr().out
    state["data"]["parts"] += ["another file"]
    path.write_text(json.dumps(state))
    with pytest.raises(
        DataError, match=r"the data or the tokenizer changed after .*step-\d+ was saved, so what step 5"
    ):
        show(tmp_path / "run", 5)
