"""The order of batches is a function of the seed and the step alone."""

import dataclasses
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data.batches import Batch
from data.config import DataConfig, DataError, Packing, Source
from data.corpus import Corpus, PackSet, open_corpus
from data.loader import train_batches, valid_batches
from data.packing import PackedStream
from data.shards import Shard, ShardWriter

CONFIG = DataConfig(
    name="r",
    path="none",
    source=Source.random,
    vocab_size=100,
    seq_len=8,
    pack_len=16,
    micro_batch_size=4,
    workers=0,
)


def take(
    corpus: Corpus, n_steps: int, *, workers: int = 0, first_step: int = 0, first_sample: int = 0
) -> list[list[Batch]]:
    steps = train_batches(
        corpus,
        dataclasses.replace(CONFIG, workers=workers),
        packs_of_step=lambda step: 4 if step < 3 else 8,  # a ramp-up
        first_step=first_step,
        first_sample=first_sample,
        pin_memory=False,
    )
    return list(islice(steps, n_steps))


def rows(steps: list[list[Batch]]) -> torch.Tensor:
    return torch.cat([batch.tokens_BT for step in steps for batch in step])


@pytest.fixture
def corpus() -> Corpus:
    corpus = open_corpus(CONFIG, vocab_size=100)
    corpus.train.streams[0].count = 10  # type: ignore[union-attr]
    corpus.train = PackSet(corpus.train.streams, seed=1024, padded=False)
    return corpus


def test_workers_do_not_change_the_order_and_epochs_hold_every_pack_once(corpus: Corpus) -> None:
    alone = take(corpus, 6)
    assert [len(step) for step in alone] == [2, 2, 2, 4, 4, 4]
    assert torch.equal(rows(alone), rows(take(corpus, 6, workers=2)))
    for epoch in range(3):
        seen = {tuple(row) for row in rows(alone)[10 * epoch : 10 * epoch + 10].tolist()}
        assert len(seen) == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_starts_later_continues_the_same_sequence(corpus: Corpus, workers: int) -> None:
    whole = rows(take(corpus, 7))
    for step, sample in ((1, 4), (3, 12), (5, 28)):
        later = rows(take(corpus, 7 - step, workers=workers, first_step=step, first_sample=sample))
        assert torch.equal(whole[sample:], later)


def test_a_batch_joins_packs_with_their_segments(corpus: Corpus) -> None:
    batch = take(corpus, 1)[0][0]
    assert batch.tokens_BT.shape == batch.labels_BT.shape == (2, 16)
    assert batch.cu_seqlens.tolist() == [0, 8, 16, 24, 32] and batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seq_len == 8 and batch.positions_BT[0].tolist() == [*range(8), *range(8)]
    assert (batch.labels_BT[:, 7] == -100).all() and (batch.labels_BT[:, :7] == batch.tokens_BT[:, 1:8]).all()


@pytest.fixture
def documents(tmp_path: Path) -> Corpus:
    streams = []
    for source, length in enumerate((37, 5)):
        writer = ShardWriter(tmp_path / str(source), vocab_size=100, tokenizer="t")
        writer.add(np.arange(length, dtype=np.uint32) + 40 * source, length)
        writer.close()
        shard = Shard(tmp_path / str(source))
        order = np.arange(1)
        streams.append(
            PackedStream(shard, pack_len=16, seq_len=8, packing=Packing.internlm, order=order, source=source)
        )
    valid = PackSet(streams, seed=0, padded=True)
    return Corpus(("a", "b"), "f", None, False, False, None, 100, valid, valid)


def test_validation_scores_every_token_once_by_source(documents: Corpus) -> None:
    batches = list(valid_batches(documents, CONFIG, max_tokens=None))
    scored = {0: [], 1: []}
    for batch in batches:
        kept = batch.labels_BT != -100
        for source in scored:
            scored[source] += batch.labels_BT[kept & (batch.source_BT == source)].tolist()
    assert scored == {0: list(range(1, 37)), 1: list(range(41, 45))}


def test_a_capped_validation_is_spread_over_the_split(documents: Corpus) -> None:
    batches = list(valid_batches(documents, CONFIG, max_tokens=32))
    assert [batch.source_BT[:, 0].tolist() for batch in batches] == [[0, 0]]
    assert [batch.tokens_BT[:, 0].tolist() for batch in batches] == [[0, 32]]


def test_an_id_that_the_header_does_not_tell_of_is_refused(documents: Corpus) -> None:
    documents.vocab_size = 36
    with pytest.raises(DataError, match="the tokens of a, b hold id 44, outside model.vocab_size"):
        list(valid_batches(documents, CONFIG, max_tokens=None))
