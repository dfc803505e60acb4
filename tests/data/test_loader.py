"""The order of batches is a function of the seed and the step alone."""

import dataclasses
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.config import DataError, Source
from data.batches import Batch
from data.dataset import Corpus, PackedDataset, open_corpus
from data.loader import train_batches, valid_batches
from data.packing import PACKINGS
from data.shards import Shard
from tests.data.conftest import data_config, write_shard

CONFIG = data_config(source=Source.random, vocab_size=100, pack_len=16, micro_batch_size=4)


@pytest.fixture(scope="module", autouse=True)
def _small_windows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.sampler.WINDOW", 16)
        yield


def take(corpus: Corpus, n_steps: int, workers: int = 0, **settings: int) -> list[list[Batch]]:
    steps = train_batches(
        corpus,
        dataclasses.replace(CONFIG, workers=workers),
        packs_of_step=lambda step: 8 if step < 3 else 16,  # a ramp-up
        pin_memory=False,
        **{"first_step": 0, "first_sample": 0} | settings,
    )
    return list(islice(steps, n_steps))


def rows(steps: list[list[Batch]]) -> torch.Tensor:
    return torch.cat([batch.tokens_BT for step in steps for batch in step])


@pytest.fixture
def corpus() -> Corpus:
    corpus = open_corpus(CONFIG, vocab_size=100)
    packing = corpus.train.packings[0]
    packing.n_packs = 20
    corpus.train = PackedDataset({0: packing}, CONFIG, vocab_size=100)
    return corpus


def test_order_with_workers_and_epochs(corpus: Corpus) -> None:
    alone = take(corpus, 6)
    assert [len(step) for step in alone] == [4, 4, 4, 8, 8, 8]
    assert torch.equal(rows(alone), rows(take(corpus, 6, workers=2)))
    assert torch.equal(rows(alone)[24:], rows(take(corpus, 3, workers=2, first_step=3, first_sample=24)))
    for epoch in range(3):
        seen = {tuple(row) for row in rows(alone)[20 * epoch : 20 * epoch + 20].tolist()}
        assert len(seen) == 20
    assert rows(alone)[:20].tolist() != rows(alone)[20:40].tolist(), "each epoch in another order"


def shards(folder: Path, lengths: list[list[int]]) -> list[Shard]:
    """Write documents of tokens that are 0 to their length, of source k from 40 k on."""
    return [
        write_shard(folder / str(source), [np.arange(length) + 40 * source for length in its])
        for source, its in enumerate(lengths)
    ]


def pack_set(files: list[Shard], weights: Sequence[float] = (), **changes: object) -> PackedDataset:
    config = dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]
    packings = {number: PACKINGS[config.packing]([file], 16, seed=config.seed) for number, file in enumerate(files)}
    return PackedDataset(packings, config, 10_000, weights)


@pytest.fixture
def documents(tmp_path: Path) -> Corpus:
    valid = pack_set(shards(tmp_path, [[37], [5]]))
    return Corpus(("a", "b"), ["f"], None, False, False, None, valid, valid)


def test_validation_scores_every_token_once(documents: Corpus) -> None:
    batches = list(valid_batches(documents, CONFIG, max_tokens=None))
    scored = {0: [], 1: []}
    for batch in batches:
        kept = batch.labels_BT != -100
        for source in scored:
            scored[source] += batch.labels_BT[kept & (batch.source_BT == source)].tolist()
    assert scored == {0: list(range(1, 37)), 1: list(range(41, 45))}
    (capped,) = valid_batches(documents, CONFIG, max_tokens=32)
    assert (capped.source_BT[:, 0].tolist(), capped.tokens_BT[:, 0].tolist()) == ([0, 0], [0, 32]), "spread over all"


@pytest.mark.parametrize("workers", [0, 2])
def test_id_outside_the_vocabulary_is_reported_with_its_place(documents: Corpus, workers: int) -> None:
    """Case 45."""
    documents.train.vocab_size = 44
    with pytest.raises(DataError, match=r"1.bin: token 4 is id 44") as raised:
        take(documents, 1, workers=workers)
    assert raised.tb and not multiprocessing.active_children(), "the process could not end while one is left"


def test_added_files_begin_a_new_epoch(tmp_path: Path) -> None:
    before = pack_set(shards(tmp_path / "a", [[16] * 10]))
    after = pack_set(shards(tmp_path / "b", [[16] * 10, [16] * 4]))
    after.begin_at(13)
    assert sorted(after.locate(np.arange(13, 27)).tolist()) == list(range(14))
    assert before.locate(np.arange(3)).tolist() != after.locate(np.arange(13, 16)).tolist()
    assert after.epochs(27) == {0: 1.0, 1: 1.0}


@given(
    lengths=st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=12), min_size=1, max_size=3),
    weighted=st.booleans(),
    packing=st.sampled_from(list(PACKINGS)),
    dp_sizes=st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=4),
    per_run=st.integers(1, 3),
)
@settings(max_examples=15, deadline=None)
def test_resume_on_other_ranks(
    tmp_path_factory: Any, lengths: list[list[int]], weighted: bool, packing: str, dp_sizes: list[int], per_run: int
) -> None:
    """A run is killed every few steps and goes on with another number of ranks, through epochs and a ramp-up."""
    files = shards(tmp_path_factory.mktemp("s"), [[*its, 40] for its in lengths])
    weights = [1.0 + 2 * i for i in range(len(files))] if weighted else []
    packs = pack_set(files, weights, packing=packing)
    corpus = Corpus(("a", "b", "c"), ["f"], None, False, False, None, packs, packs)
    alone = take(corpus, per_run * len(dp_sizes))
    step, sample = 0, 0
    for dp_size in dp_sizes:
        here = {"first_step": step, "first_sample": sample, "dp_size": dp_size}
        ranks = [take(corpus, per_run, dp_rank=rank, **here) for rank in range(dp_size)]
        for done in range(per_run):
            together = [batch for micro in zip(*(rank[done] for rank in ranks), strict=True) for batch in micro]
            for one, other in zip(alone[step], together, strict=True):
                for name in ("tokens_BT", "labels_BT", "positions_BT", "source_BT", "cu_seqlens"):
                    assert torch.equal(getattr(one, name), getattr(other, name)), name
            step, sample = step + 1, sample + 2 * len(alone[step])
    seen = packs.locate(np.arange(sample)).tolist()
    if not weighted:
        epochs = [Counter(seen[i : i + packs.n_packs]) for i in range(0, sample - packs.n_packs + 1, packs.n_packs)]
        assert all(epoch == Counter(range(packs.n_packs)) for epoch in epochs)


# torch's loader may see the worker that was killed for it only as it ends
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["hangs", "is killed"])
def test_a_worker_that_hangs_or_is_killed(corpus: Corpus, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Case 38."""

    def batch(*_: object) -> None:
        time.sleep(60) if how == "hangs" else os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(PackedDataset, "batch", batch)
    monkeypatch.setattr(f"{__name__}.CONFIG", dataclasses.replace(CONFIG, worker_timeout_s=0.5))
    reason = "timed out after 0.5 seconds" if how == "hangs" else "killed by signal|exited"
    with pytest.raises(RuntimeError, match=reason):
        take(corpus, 1, workers=1)
    for child in multiprocessing.active_children():
        child.join(1)
    assert not multiprocessing.active_children(), "nothing is left that would be waited for"
