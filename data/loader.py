"""Steps of micro-batches, read ahead by worker processes, in an order that no worker can change."""

import signal
from collections.abc import Callable, Generator, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.batches import Batch, collate
from data.config import DataConfig, DataError
from data.corpus import Corpus, PackSet
from data.packing import Pack


class _Samples(Dataset[Pack]):
    def __init__(self, packs: PackSet) -> None:
        self.packs = packs

    def __getitem__(self, index: int) -> Pack:
        return self.packs.sample(index)


def _ignore_signals(_worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach every process; the main one decides when the workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def train_batches(
    corpus: Corpus,
    config: DataConfig,
    *,
    packs_of_step: Callable[[int], int],
    first_step: int,
    first_sample: int,
    pin_memory: bool,
) -> Generator[list[Batch], None, None]:
    """Yield, step by step without end, the micro-batches of the step.

    Step `first_step` starts at sample `first_sample` of the corpus' shuffled sequence and takes
    `packs_of_step(step)` samples; nothing before it is read.
    """
    per_batch = config.packs_per_micro_batch

    def micro_batches() -> Iterator[list[int]]:
        step, sample = first_step, first_sample
        while True:
            end = sample + packs_of_step(step)
            yield from (list(range(at, min(at + per_batch, end))) for at in range(sample, end, per_batch))
            step, sample = step + 1, end

    loader = DataLoader(
        _Samples(corpus.train),
        batch_sampler=micro_batches(),  # type: ignore[arg-type]
        num_workers=config.workers,
        collate_fn=collate,
        worker_init_fn=_ignore_signals if config.workers else None,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its draws are of no use here, and must not move the run's own generator
    )
    batches = iter(loader)
    step = first_step
    while True:
        n_batches = -(-packs_of_step(step) // per_batch)
        yield [_checked(next(batches), corpus) for _ in range(n_batches)]
        step += 1


def valid_batches(corpus: Corpus, config: DataConfig, *, max_tokens: int | None) -> Iterator[Batch]:
    """Yield the validation split in corpus order, every token once; the last pack of a source is padded.

    `max_tokens` keeps about that many, from packs spread evenly over the split.
    """
    n_packs = corpus.valid.n_packs
    kept = n_packs if max_tokens is None else min(n_packs, -(-max_tokens // config.pack_tokens))
    chosen = np.linspace(0, n_packs, kept, endpoint=False).astype(np.int64)
    per_batch = config.packs_per_micro_batch
    for at in range(0, kept, per_batch):
        packs = [corpus.valid.in_order(int(index)) for index in chosen[at : at + per_batch]]
        yield _checked(collate(packs), corpus)


def _checked(batch: Batch, corpus: Corpus) -> Batch:
    """Refuse a token that the model has no row for: on a GPU it would be an assertion far from here."""
    largest = int(torch.max(batch.tokens_BT))
    if largest >= corpus.vocab_size:
        names = {corpus.sources[int(i)] for i in batch.source_BT[:, 0]}
        raise DataError(
            f"the tokens of {', '.join(sorted(names))} hold id {largest}, outside model.vocab_size "
            f"({corpus.vocab_size}), which their header does not tell: the shard is damaged; prepare it again"
        )
    return batch
