"""Documents laid end to end and cut into packs of equal length, as InternLM cuts them."""

from dataclasses import dataclass

import numpy as np

from data.config import Packing
from data.shards import Shard

IGNORED = -100


@dataclass(slots=True)
class Pack:
    tokens_T: np.ndarray  # int64
    labels_T: np.ndarray  # int64, the next token of the same document, or -100
    positions_T: np.ndarray  # int64, from 0 in each segment
    segment_lens: list[int]  # tokens that see each other; they add up to T
    source: int


class PackedStream:
    """The packs of one source, its documents in a shuffled order that is the same in every epoch.

    InternLM's `PackedDataset` and `PackedDatasetWithoutCuSeqlen` (v0.2.1). Unlike theirs, token 0 is
    a token like any other: it can be a target.
    """

    def __init__(self, shard: Shard, *, pack_len: int, seq_len: int, packing: Packing, order: np.ndarray, source: int):
        self.shard, self.pack_len, self.seq_len, self.packing = shard, pack_len, seq_len, packing
        self.order, self.source = order, source
        lengths = np.diff(shard.offsets)[order]
        self.starts = np.concatenate([[0], np.cumsum(lengths)])  # of the documents in the stream
        self.n_tokens = int(self.starts[-1])

    def n_packs(self, *, padded: bool) -> int:
        """Count the packs: whole ones, or with `padded` also what is left over."""
        return -(-self.n_tokens // self.pack_len) if padded else self.n_tokens // self.pack_len

    def pack(self, index: int) -> Pack:
        """Give a pack; the last one may be padded with ignored tokens that see only each other."""
        start = index * self.pack_len
        end = min(start + self.pack_len, self.n_tokens)
        tokens = np.zeros(self.pack_len, dtype=np.int64)
        labels = np.full(self.pack_len, IGNORED, dtype=np.int64)
        lens: list[int] = []
        place = start
        slot = int(np.searchsorted(self.starts, start, side="right")) - 1
        while place < end:
            inside = place - int(self.starts[slot])
            stop = min(end, int(self.starts[slot + 1]))
            document = self.shard.document(int(self.order[slot]))
            piece = document[inside : inside + stop - place]
            at = place - start
            tokens[at : at + len(piece)] = piece
            following = document[inside + 1 : inside + 1 + stop - place]  # none after the last of a document
            labels[at : at + len(following)] = following
            if len(piece):
                lens += _cut(len(piece), self.seq_len)
            place, slot = stop, slot + 1
        lens += _cut(self.pack_len - (end - start), self.seq_len)
        if self.packing is Packing.internlm_one:
            labels[end - start - 1] = IGNORED
            lens = _cut(self.pack_len, self.seq_len)
        positions = np.concatenate([np.arange(n, dtype=np.int64) for n in lens])
        return Pack(tokens, labels, positions, lens, self.source)


def _cut(length: int, longest: int) -> list[int]:
    """Cut a length into pieces of `longest`, the rest last."""
    rest = length % longest
    return [longest] * (length // longest) + ([rest] if rest else [])


class RandomStream:
    """Packs of uniformly random tokens, each a pure function of its index."""

    def __init__(self, *, vocab_size: int, pack_len: int, seq_len: int, seed: int, n_packs: int) -> None:
        self.vocab_size, self.pack_len, self.seq_len = vocab_size, pack_len, seq_len
        self.seed, self.count, self.source = seed, n_packs, 0
        self.n_tokens = n_packs * pack_len

    def n_packs(self, *, padded: bool) -> int:
        return self.count

    def pack(self, index: int) -> Pack:
        tokens = np.random.default_rng((self.seed, index)).integers(0, self.vocab_size, self.pack_len)
        lens = _cut(self.pack_len, self.seq_len)
        ends = np.cumsum(lens) - 1
        labels = np.roll(tokens, -1)
        labels[ends] = IGNORED
        positions = np.concatenate([np.arange(n, dtype=np.int64) for n in lens])
        return Pack(tokens, labels, positions, lens, 0)
