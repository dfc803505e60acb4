"""What is shown of a step is what it trains on."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from corpus.config import DataError
from data.batches import IGNORED
from data.dataset import Corpus, PackedDataset, open_corpus
from data.packing import Concat
from data.shards import LOSS_MASKED
from data.show import main, marked, show, show_pack
from data.tokenizer import Tokenizer
from tests.conftest import trained
from tests.corpora import exported
from tests.data.conftest import data_config, write_shard
from training.loop import Periodic, Run


@pytest.fixture
def corpus(corpus_dir: Path) -> Corpus:
    return open_corpus(data_config(corpus_dir, seq_len=32, micro_batch_size=2), vocab_size=1024)


def test_documents_of_a_step(run_dir: Path, corpus: Corpus, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.show.escape_unprintable", lambda: None)
    main([str(run_dir), "--step", "8"])
    head, *packs = re.split(r"\n=== (?=sample \d)", capsys.readouterr().out)
    assert head == f"step 8 of {run_dir}: samples 28 to 31, each 32 tokens\n"
    assert corpus.tokenizer is not None and len(packs) == 4
    found = corpus.train.locate(np.arange(28, 32))
    batch = corpus.train.batch(found)
    for row, (pack, shown) in enumerate(zip(found.tolist(), packs, strict=True)):
        source = corpus.sources[int(batch.source_BT[row, 0])]
        targets = int((batch.labels_BT[row] != IGNORED).sum())
        pieces = corpus.train.pieces(np.array([pack]))
        head = f"sample {28 + row}: pack {pack} of {source}, documents: {len(pieces.starts)}, targets: {targets}\n"
        assert shown.startswith(head)
        shown, *_ = re.split(r"\n--- \d+ tokens of padding", shown)
        texts = [part.split("\n", 1)[1] for part in re.split(r"\n--- (?=\S+\.bin from token \d)", shown)[1:]]
        text = re.sub("[⟦⟧]|</s>", "", "".join(text.rstrip("\n") for text in texts))
        parts = zip(pieces.files, pieces.starts, pieces.lengths, strict=True)
        whole = "".join(corpus.tokenizer.decode(corpus.train.files[f].read(s, n).tolist()) for f, s, n in parts)
        assert text.split() == whole.split() or "".join(text.split()) == "".join(whole.split())


def test_brackets_around_non_targets(tokenizer: Tokenizer, tmp_path: Path, capsys: Any) -> None:
    prompt, answer = (np.array(tokenizer.encode(text), dtype=np.uint32) for text in ("Why? ", "Because."))
    ids = np.concatenate([prompt | np.uint32(LOSS_MASKED), answer])
    shard = write_shard(tmp_path / "sft", [ids], vocab_size=1000, masked=True)
    config = data_config(seq_len=len(ids) + 3)
    packs = PackedDataset({0: Concat([shard], len(ids) + 3, seed=None)}, config, vocab_size=1000)
    corpus = Corpus(("sft",), ["p"], tokenizer, False, False, None, packs, packs)
    show_pack(corpus, 5, 0)
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"=== sample 5: pack 0 of sft, documents: 1, targets: {len(answer)}",
        f"--- {tmp_path}/sft.bin from token 0, {len(ids)} tokens",
        "⟦Why? ⟧Because.",
        "--- 3 tokens of padding",
    ]
    assert marked(None, np.array([7, 8, 9]), np.array([False, True, False])) == "⟦7⟧8⟦9⟧"


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_characters_of_several_tokens(tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    if kind == "huggingface":
        tokenizer = exported(tokenizer, tmp_path)
    ids = np.array(tokenizer.encode("龘靐齉 a"))
    assert len(ids) > 9, "three bytes per character"
    for first in range(1, len(ids)):
        assert marked(tokenizer, ids, np.arange(len(ids)) >= first).replace("⟦", "").replace("⟧", "") == "龘靐齉 a"
    assert marked(tokenizer, ids, np.arange(len(ids)) >= 3) == "⟦龘⟧靐齉 a"
    assert tokenizer.bos_id is not None and tokenizer.eos_id is not None
    ends = np.array([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.eos_id])
    assert marked(tokenizer, ends, np.arange(len(ends)) >= 4) == "⟦<s>龘⟧靐齉 a</s></s>"


def test_steps_after_accepted_changes(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained_on: dict[int, list[list[int]]] = {}
    shown: list[list[int]] = []

    def keep(run: Run) -> None:
        trained_on[run.state.step] = torch.cat([batch.tokens_BT for batch in run.batches]).tolist()

    def read(corpus: Corpus, _sample: int, pack: int) -> None:
        shown.extend(corpus.train.batch(np.array([pack])).tokens_BT.tolist())

    monkeypatch.setattr("data.show.show_pack", read)
    accepted = "checkpoint.accept_changes=[steps,global_batch_tokens,ramp,data,skip_batches]"
    ramp = ["ramp.start_tokens=64", "ramp.increment_tokens=64", "ramp.every_steps=3", "global_batch_tokens=512"]
    shape = [*ramp, "data.seq_len=16", "data.micro_batch_size=4", "++data.mix.code=1"]
    parts = ([], [*shape, "skip_batches=[3-4]", "data.packing=best_fit"])
    for number, part in enumerate(parts, 1):
        options = [*small, "valid_tokens=32", f"steps={2 * number}", *part, accepted]
        trained(tmp_path / "run", *options, periodic=[Periodic(1, keep)])
    assert set(trained_on) == set(range(1, 5)) and len(trained_on[1]) == 4
    for step, packs in trained_on.items():
        shown.clear()
        show(tmp_path / "run", step)
        assert shown == packs, f"step {step}"
        assert ("not trained on" in capsys.readouterr().out) == (step > 2)


def test_unknown_steps(run_dir: Path, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    path = tmp_path / "run" / "batches.jsonl"
    note = json.loads(path.read_text())
    grown = {**note, "step": 4, "samples": 16, "first_sample": 16}
    path.write_text(json.dumps({**note, "fingerprint": "before files were added"}) + "\n" + json.dumps(grown) + "\n")
    with pytest.raises(DataError, match="step 4 "):
        show(tmp_path / "run", 4)
    show(tmp_path / "run", 9999, samples=1)
    assert " has not reached step 9999: it is at step " in capsys.readouterr().out
    show(tmp_path / "run", 5, samples=1)
    corpus.train.begin_at(16)
    (pack,) = corpus.train.locate(np.array([16])).tolist()
    assert f"=== sample 16: pack {pack} of " in capsys.readouterr().out
    path.write_text(json.dumps(grown) + "\n")  # begun at another run's place, with init_content
    with pytest.raises(SystemExit, match="step 4 "):
        main([str(tmp_path / "run"), "--step", "4"])
