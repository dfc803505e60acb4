"""Packings: the layout of documents in packs of equal length."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

import numpy as np

from corpus.config import DataError
from data.best_fit import Plan
from data.sampler import scramble
from data.shards import LOSS_MASKED, TokenFile

SAMPLED_PACKS = 1 << 14  # to estimate the waste of a larger corpus


class Pieces(NamedTuple):
    """Parts of documents, in order of packs; each field but the first has one entry per piece."""

    n_pieces: np.ndarray  # per pack
    files: np.ndarray  # index into the packing's files
    starts: np.ndarray  # offset in the file, in tokens
    lengths: np.ndarray
    begins: np.ndarray  # bool: the piece starts a document
    ends: np.ndarray  # bool: the piece ends a document

    @staticmethod
    def gathered(packs: np.ndarray, limits: np.ndarray, pieces_of: "Callable[[int, np.ndarray], Pieces]") -> "Pieces":
        """Return the pieces of packs from several groups, bounded by `limits`, by calling `pieces_of(group, packs)`."""
        groups = np.searchsorted(limits, packs, side="right") - 1
        parts = [pieces_of(group, packs[groups == group] - limits[group]) for group in np.unique(groups).tolist()]
        if len(parts) == 1:
            return parts[0]
        order = np.argsort(groups, kind="stable")
        n_pieces, *columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        by_pack = np.argsort(np.repeat(order, n_pieces), kind="stable")
        return Pieces(n_pieces[np.argsort(order)], *(column[by_pack] for column in columns))


class Packing(ABC):
    """The packs of a source's files, of `pack_len` tokens each; a subclass chooses the pieces of each pack.

    `seed` orders the documents; None for validation, which must keep every token.
    """

    isolated = True  # tokens attend within their document; False: within every `seq_len` tokens
    n_packs: int

    def __init__(self, files: list[TokenFile], pack_len: int, *, seed: int | None) -> None:
        self.files, self.pack_len, self.seed = files, pack_len, seed
        self.lay_out()

    @abstractmethod
    def lay_out(self) -> None:
        """Set `n_packs`, and any state that `pieces` needs."""

    @abstractmethod
    def pieces(self, packs: np.ndarray) -> Pieces:
        """Return the pieces of packs, a pure function of their indices, int64 (N,)."""


def waste(n_packs: int, pieces_of: Callable[[np.ndarray], Pieces], pack_len: int) -> tuple[float, float]:
    """Return the fraction of padding tokens and the fraction of split documents, from a sample of packs."""
    packs = np.linspace(0, n_packs, min(n_packs, SAMPLED_PACKS), endpoint=False).astype(np.int64)
    if not len(packs):
        return 0.0, 0.0
    pieces = pieces_of(packs)
    whole, documents = int((pieces.begins & pieces.ends).sum()), int(pieces.begins.sum())
    return float(1 - pieces.lengths.sum() / (len(packs) * pack_len)), 1 - whole / max(1, documents)


class Concat(Packing):
    """Documents concatenated in file order, split every `pack_len` tokens; a file's last pack is padded.

    Keeps no state per document, so a corpus of any size opens at once.
    """

    def lay_out(self) -> None:
        self.sizes = np.array([file.n_tokens for file in self.files], dtype=np.int64)
        self.limits = np.append(0, np.cumsum(-(-self.sizes // self.pack_len)))
        self.n_packs = int(self.limits[-1])

    def pieces(self, packs: np.ndarray) -> Pieces:
        files = np.searchsorted(self.limits, packs, side="right") - 1
        starts = (packs - self.limits[files]) * self.pack_len
        stops = np.minimum(starts + self.pack_len, self.sizes[files])
        # Positions in all packs, pack k's from k * stride to k * stride + pack_len, its end included.
        stride = self.pack_len + 1
        bases = np.arange(len(packs)) * stride
        ends = [bases[starts == 0]]  # a file begins where a document before it would end
        for file in set(files.tolist()):
            here = np.flatnonzero(files == file)
            found, counts = self.files[file].ends_between(np.maximum(starts[here] - 1, 0), stops[here])
            ends.append(found + np.repeat(bases[here] - starts[here], counts))
        ended = np.concatenate(ends)
        limits = np.unique(np.concatenate([ended, bases, bases + stops - starts]))
        rows, is_end = limits // stride, np.zeros(len(limits), dtype=bool)
        is_end[np.searchsorted(limits, ended)] = True
        inside = rows[1:] == rows[:-1]  # between two limits of one pack
        row, start, length = rows[1:][inside], limits[:-1][inside], np.diff(limits)[inside]
        n_pieces, place = np.bincount(row, minlength=len(packs)), start - bases[row] + starts[row]
        return Pieces(n_pieces, files[row], place, length, is_end[:-1][inside], is_end[1:][inside])


class InternLM(Packing):
    """Documents concatenated in a shuffled order, the same in every epoch, and split every `pack_len` tokens.

    InternLM's `PackedDataset` (v0.2.1), which drops an incomplete last pack; validation keeps it. Takes 16 bytes of
    memory per document. Unlike in InternLM, token 0 can be a target.
    """

    def lay_out(self) -> None:
        offsets = [file.offsets() for file in self.files]
        self.file = np.repeat(np.arange(len(offsets)), [len(o) - 1 for o in offsets])
        self.start = np.concatenate([np.zeros(0, dtype=np.int64), *(o[:-1] for o in offsets)])
        self.length = np.concatenate([np.zeros(0, dtype=np.int64), *(np.diff(o) for o in offsets)])
        order = np.arange(len(self.start))
        if self.seed is not None:
            np.random.RandomState(self.seed).shuffle(order)
        self.set_order(order)

    def set_order(self, order: np.ndarray) -> None:
        """Concatenate the documents in this order."""
        self.order, self.limits = order, np.concatenate([[0], np.cumsum(self.length[order])])
        self.n_tokens = int(self.limits[-1])
        self.n_packs = (self.n_tokens if self.seed is not None else self.n_tokens + self.pack_len - 1) // self.pack_len

    def pieces(self, packs: np.ndarray) -> Pieces:
        begin = packs * self.pack_len
        stop = np.minimum(begin + self.pack_len, self.n_tokens)
        first = np.searchsorted(self.limits, begin, side="right") - 1
        counts = np.searchsorted(self.limits, stop, side="left") - first
        before = np.cumsum(counts) - counts
        slots = np.arange(int(counts.sum())) + np.repeat(first - before, counts)  # first, first + 1, ... of each pack
        low = np.maximum(self.limits[slots], np.repeat(begin, counts))
        high = np.minimum(self.limits[slots + 1], np.repeat(stop, counts))
        kept = high > low  # without empty documents
        n_pieces = np.bincount(np.repeat(np.arange(len(packs)), counts)[kept], minlength=len(packs))
        slots, low, high = slots[kept], low[kept], high[kept]
        documents, at = self.order[slots], low - self.limits[slots]
        ends = high == self.limits[slots + 1]
        return Pieces(n_pieces, self.file[documents], self.start[documents] + at, high - low, at == 0, ends)


class InternLMOne(InternLM):
    """InternLM's `PackedDatasetWithoutCuSeqlen`: the same, but tokens attend across documents."""

    isolated = False


class BestFit(Packing):
    """Whole documents, longest first, each in the fullest pack with room for it (best-fit decreasing), per file.

    "Fewer Truncations Improve Language Modeling" (Ding et al. 2024). Documents longer than a pack are split,
    conversations truncated. The plan is cached next to the tokens.
    """

    def lay_out(self) -> None:
        self.plans = [Plan(file, self.pack_len) for file in self.files]
        self.limits = np.cumsum([0, *(plan.n_packs for plan in self.plans)])
        self.n_packs = int(self.limits[-1])

    def pieces(self, packs: np.ndarray) -> Pieces:
        def of_file(file: int, packs: np.ndarray) -> Pieces:
            n_pieces, lines = self.plans[file].read(packs)
            starts, lengths, begins, ends = lines.T
            return Pieces(n_pieces, np.full(len(lines), file), starts, lengths, begins > 0, ends > 0)

        return Pieces.gathered(packs, self.limits, of_file)


PACKINGS = {"concat": Concat, "best_fit": BestFit, "internlm": InternLM, "internlm_one": InternLMOne}


def find_packing(name: str) -> type[Packing]:
    try:
        return resolve_name(name) if ":" in name else PACKINGS[name]
    except (KeyError, ImportError, AttributeError, ValueError):
        raise DataError(f"data.packing ({name}) was not found; use {', '.join(PACKINGS)} or module:Class") from None


@dataclass(slots=True)
class Rows:
    """Packs as rows of L tokens, plus one more for the last target."""

    tokens: np.ndarray  # int32 (N, L + 1)
    ends: np.ndarray  # offsets in the row at which documents end, row after row
    n_ends: np.ndarray  # number of `ends` per row
    used: np.ndarray  # tokens per row without padding
    loss_mask: np.ndarray | None = None  # bool (N, L + 1), True where a token is a target; None if all are


def read_rows(files: Sequence[TokenFile], pieces: Pieces, pack_len: int, seq_len: int) -> Rows:
    """Read packs, padded with 0. Tokens of a conversation more than `seq_len` after its start are no targets."""
    n_pieces, numbers, starts, lengths, begins, ends = pieces
    row = np.repeat(np.arange(len(n_pieces)), n_pieces)
    used = np.bincount(row, lengths, minlength=len(n_pieces)).astype(np.int64)
    stops = np.cumsum(lengths) - (np.cumsum(used) - used)[row]  # in the row
    cut = ~ends & (stops == pack_len)
    tokens = np.empty((len(n_pieces), pack_len + 1), dtype=np.int32)
    tokens[:, -1] = 0
    for short in np.flatnonzero(used < pack_len).tolist():
        tokens[short, used[short] :] = 0
    rows = Rows(tokens, stops[~cut], np.bincount(row[~cut], minlength=len(n_pieces)), used)
    first_places = row * (pack_len + 1) + stops - lengths
    # adjacent pieces of a file are read at once, with one more token as the last target of a split document
    follows = (row[1:] == row[:-1]) & (numbers[1:] == numbers[:-1]) & (starts[1:] == (starts + lengths)[:-1])
    heads = np.flatnonzero(np.append(True, ~follows))
    counts = np.add.reduceat(lengths + cut, heads)
    places, starts, numbers = first_places[heads], starts[heads], numbers[heads]
    for number in set(numbers.tolist()):
        here, file = numbers == number, files[number]
        parts = places[here].tolist(), starts[here].tolist(), counts[here].tolist()
        flat = tokens.reshape(-1)
        file.read_into(flat, *parts)
        if file.masked:
            if rows.loss_mask is None:
                rows.loss_mask = np.ones(tokens.shape, dtype=bool)
            loss_mask = rows.loss_mask.reshape(-1)
            for place, _, count in zip(*parts, strict=True):
                span = slice(place, place + count)
                loss_mask[span] = flat[span] >= 0
                flat[span] &= LOSS_MASKED - 1
            unseen = first_places + np.where(begins, seq_len + 1, 0)  # from here on the start is out of attention
            piece_stops = first_places + lengths + cut
            for piece in np.flatnonzero(file.conversations & (pieces.files == number) & (unseen < piece_stops)):
                loss_mask[unseen[piece] : piece_stops[piece]] = False
    return rows


class RandomTokens(TokenFile):
    """Uniformly random tokens in documents of `document_len`, each a pure function of seed and position."""

    def __init__(self, vocab_size: int, n_tokens: int, document_len: int, seed: int) -> None:
        self.stem, self.vocab_size, self.seed = Path("random"), vocab_size, seed
        self.key = scramble(np.array([seed], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        self.n_tokens, self.n_documents, self.document_len = n_tokens, n_tokens // document_len, document_len

    def read_into(self, out: np.ndarray, places: list[int], starts: list[int], counts: list[int]) -> None:
        for place, start, count in zip(places, starts, counts, strict=True):
            bits = scramble(np.arange(start, start + count, dtype=np.uint64) + self.key)
            out[place : place + count] = bits % np.uint64(self.vocab_size)

    def offsets(self) -> np.ndarray:
        return np.arange(0, self.n_tokens + 1, self.document_len)

    def fingerprint(self) -> str:
        return f"random/{self.vocab_size}/{self.seed}"
