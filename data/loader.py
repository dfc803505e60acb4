"""Data loading by worker processes, in an order that does not depend on their number."""

import ctypes
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from corpus.config import DataError
from data.batches import IGNORED, Batch
from data.config import DataConfig
from data.dataset import Corpus, PackedDataset


class _MicroBatches(Dataset[Batch | DataError]):
    """Micro-batches by sample indices. Errors are returned, so that they reach the main process unchanged."""

    def __init__(self, packs: PackedDataset) -> None:
        self.packs = packs

    def __getitem__(self, samples: list[int]) -> Batch | DataError:
        try:
            return self.packs.batch(self.packs.locate(np.array(samples, dtype=np.int64)))
        except DataError as error:
            return error


def _start_worker(_worker: int) -> None:
    keep_freed_memory()
    with suppress(OSError, AttributeError):  # not Linux
        # die with the main process: workers inherit the lock of the run folder
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    # Ctrl-C and a scheduler's SIGTERM reach every process; the main process stops the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def keep_freed_memory() -> None:
    """Make malloc reuse the memory of batches; page faults take half of the time of a batch otherwise."""
    with suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 1 << 28)  # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD at its maximum


def train_batches(
    corpus: Corpus,
    config: DataConfig,
    *,
    packs_of_step: Callable[[int], int],
    first_step: int,
    first_sample: int,
    pin_memory: bool,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Generator[list[Batch], None, None]:
    """Yield this rank's micro-batches of each step, endlessly.

    Step `first_step` starts at sample `first_sample` and takes `packs_of_step(step)` samples. Micro-batch j of
    data-parallel rank r is number j * dp_size + r of the step, so that a step has the same samples for any
    number of ranks.
    """
    per_batch = config.packs_per_micro_batch

    def of_step(step: int, sample: int) -> list[list[int]]:
        end = sample + packs_of_step(step)
        return [list(range(at, min(at + per_batch, end))) for at in range(sample, end, per_batch)][dp_rank::dp_size]

    def micro_batches() -> Iterator[list[int]]:
        step, sample = first_step, first_sample
        while True:
            yield from of_step(step, sample)
            step, sample = step + 1, sample + packs_of_step(step)

    loader = DataLoader(
        _MicroBatches(corpus.train),
        batch_size=None,
        sampler=micro_batches(),  # type: ignore[arg-type]
        num_workers=config.workers,
        worker_init_fn=_start_worker if config.workers else None,
        timeout=config.worker_timeout_s if config.workers else 0,
        # explicit, because joblib replaces the default in its worker processes
        multiprocessing_context="fork" if config.workers and sys.platform == "linux" else None,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # do not advance the global generator
    )
    batches = iter(loader)
    step = first_step
    try:
        while True:
            found = [next(batches) for _ in of_step(step, 0)]
            if errors := [item for item in found if isinstance(item, DataError)]:
                raise errors[0]
            yield found
            step += 1
    finally:
        workers = getattr(batches, "_workers", [])
        del batches  # shuts the workers down, even if a traceback keeps this frame alive
        for worker in workers:  # Python would wait for a hanging one at exit
            worker.kill()


def valid_batches(
    corpus: Corpus, config: DataConfig, *, max_tokens: int | None, dp_rank: int = 0, dp_size: int = 1
) -> Iterator[Batch]:
    """Yield the validation split in corpus order, every token once; the last pack of a source is padded.

    `max_tokens` limits it to packs spread evenly over the split. Every rank has the same number of batches, all of
    one shape; the last ones are filled up with packs without targets.
    """
    n_packs, per_batch = corpus.valid.n_packs, config.packs_per_micro_batch
    kept = n_packs if max_tokens is None else min(n_packs, -(-max_tokens // config.pack_tokens))
    chosen = np.linspace(0, n_packs, kept, endpoint=False).astype(np.int64)
    rounds = -(-kept // (per_batch * dp_size))
    for at in range(dp_rank * per_batch, rounds * per_batch * dp_size, per_batch * dp_size):
        here = chosen[at : at + per_batch]
        batch = corpus.valid.batch(np.append(here, np.repeat(chosen[:1], per_batch - len(here))))
        batch.labels_BT[len(here) :] = IGNORED
        yield batch
