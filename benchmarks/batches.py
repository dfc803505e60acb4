"""Batches of real tokens for the benchmarks: the built-in corpus, split into documents of given lengths."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.loader import lengths
from data.batches import IGNORED, Batch
from data.shards import Shard

CORPUS = Path("corpora/builtin")


def prepare() -> None:
    """Prepare the built-in corpus if it is missing, in about 20 seconds."""
    if not any((CORPUS / "train").glob("*.json")):
        command = [sys.executable, str(Path(__file__).parent.parent / "prepare_data.py"), "data=builtin"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def stream(vocab_size: int) -> np.ndarray:
    """Return the tokens of the prepared built-in corpus."""
    stems = [path.with_suffix("") for path in sorted((CORPUS / "train").glob("*.json"))]
    if not stems:
        raise SystemExit("the built-in corpus is not prepared: python prepare_data.py data=builtin")
    shards = [Shard(stem) for stem in stems]
    tokens = np.concatenate([shard.document(i) for shard in shards for i in range(shard.n_documents)])
    assert int(tokens.max()) < vocab_size
    return tokens.astype(np.int64)


def micro_batches(vocab_size: int, rows: int, row_len: int, documents: str) -> Iterator[Batch]:
    """Yield an endless stream of micro-batches; `documents` is `equal` (one per row) or `pile` (The Pile's lengths)."""
    tokens, random, at = stream(vocab_size), np.random.default_rng(0), 0
    total = rows * row_len
    while True:
        if at + total + 1 > len(tokens):
            at = 0
        part = torch.from_numpy(tokens[at : at + total + 1].astype(np.int32))
        at += total
        ends = set(range(row_len, total + 1, row_len))
        if documents == "pile":
            ends |= {int(end) for end in lengths(random, total).cumsum() if end < total}
        limits = np.array([0, *sorted(ends)], dtype=np.int32)
        sizes = np.diff(limits)
        labels = part[1:].clone()
        labels[torch.from_numpy(limits[1:] - 1).long()] = IGNORED
        positions = np.arange(total, dtype=np.int32) - np.repeat(limits[:-1], sizes)
        yield Batch(
            tokens_BT=part[:-1].view(rows, row_len),
            labels_BT=labels.view(rows, row_len),
            positions_BT=torch.from_numpy(positions).view(rows, row_len),
            source_BT=torch.zeros(rows, row_len, dtype=torch.int32),
            cu_seqlens=torch.from_numpy(limits),
            max_seq_len=int(sizes.max()),
        )
