"""Documents cut into packs of equal length: what each pack holds, and where."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from data.best_fit import LINE, Plan
from data.config import Packing
from data.shards import LOSS_MASKED

COUNTED_DOCUMENTS = 1 << 20  # whose waste and cuts stand for those of a larger corpus


class Tokens(Protocol):
    """A file of tokens with its documents, as `data.shards.Shard` is one."""

    stem: Path
    n_tokens: int
    n_documents: int
    masked: bool

    def read_parts(self, out: np.ndarray, places: list[int], starts: list[int], counts: list[int]) -> None:
        """Read `counts` tokens from `starts` on to `places` in `out`, int32 (n,)."""
        ...

    def read(self, start: int, n_tokens: int) -> np.ndarray: ...
    def fingerprint(self) -> str: ...
    def all_offsets(self) -> np.ndarray: ...
    def ends_between(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


class Piece(NamedTuple):
    """A part of a document that lies in a pack."""

    file: Tokens
    start: int  # in the file, in tokens
    length: int
    ends: bool  # the document ends here


@dataclass(slots=True)
class Rows:
    """Packs as rows of L tokens, and one more for the target of the last.

    Attributes:
        tokens: int32 (N, L + 1).
        ends: where documents end in each row, counted from its beginning; in order, row after row.
        n_ends: how many of `ends` are each row's.
        used: tokens of each row before its padding.
        learnt: bool (N, L + 1), or None where every token is to be learnt.
    """

    tokens: np.ndarray
    ends: np.ndarray
    n_ends: np.ndarray
    used: np.ndarray
    learnt: np.ndarray | None = None

    @staticmethod
    def empty(used: np.ndarray, ends: np.ndarray, n_ends: np.ndarray, pack_len: int) -> "Rows":
        """Make rows whose `used` tokens are still to be read; padding is 0."""
        tokens = np.empty((len(used), pack_len + 1), dtype=np.int32)
        tokens[:, -1] = 0
        for row in np.flatnonzero(used < pack_len).tolist():
            tokens[row, used[row] :] = 0
        return Rows(tokens, ends, n_ends, used)

    def joined(self, others: "list[Rows]", order: np.ndarray) -> "Rows":
        """Put rows below each other, and the i-th of them at place order[i]."""
        parts = [self, *others]
        place = np.argsort(order)
        tokens, used = np.concatenate([p.tokens for p in parts]), np.concatenate([p.used for p in parts])
        n_ends = np.concatenate([p.n_ends for p in parts])
        ends = np.split(np.concatenate([p.ends for p in parts]), np.cumsum(n_ends)[:-1])
        learnt = None
        if any(p.learnt is not None for p in parts):
            learnt = np.concatenate([np.ones(p.tokens.shape, bool) if p.learnt is None else p.learnt for p in parts])[
                place
            ]
        return Rows(tokens[place], np.concatenate([ends[i] for i in place]), n_ends[place], used[place], learnt)

    def read(self, file: Tokens, places: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> None:
        """Read parts of a file to places in the rows laid end to end; what is not to be learnt goes to `learnt`."""
        flat = self.tokens.reshape(-1)
        parts = places.tolist(), starts.tolist(), counts.tolist()
        file.read_parts(flat, *parts)
        if file.masked:
            if self.learnt is None:
                self.learnt = np.ones(self.tokens.shape, dtype=bool)
            learnt = self.learnt.reshape(-1)
            for place, _, count in zip(*parts, strict=True):
                here = slice(place, place + count)
                learnt[here] = flat[here] >= 0
                flat[here] &= LOSS_MASKED - 1


class Layout(Protocol):
    """The packs of a source, numbered."""

    n_packs: int

    def rows(self, packs: np.ndarray) -> Rows: ...

    def pieces(self, pack: int) -> list[Piece]: ...

    def waste(self) -> tuple[float, float]:
        """Give the share of tokens that is padding and the share of documents that is cut."""
        ...


class Concat:
    """Documents end to end as they lie in each file, cut every `pack_len` tokens; a file's last pack is padded.

    Nothing is kept in memory for a document, so a corpus of any size is open at once.
    """

    def __init__(self, files: list[Tokens], pack_len: int) -> None:
        self.files, self.pack_len = files, pack_len
        self.sizes = np.array([file.n_tokens for file in files], dtype=np.int64)
        self.limits = np.cumsum([0, *(-(-file.n_tokens // pack_len) for file in files)])
        self.n_packs = int(self.limits[-1])

    def rows(self, packs: np.ndarray) -> Rows:
        numbers = np.searchsorted(self.limits, packs, side="right") - 1
        starts = (packs - self.limits[numbers]) * self.pack_len
        left = self.sizes[numbers] - starts
        used = np.minimum(left, self.pack_len)
        files = [(self.files[number], np.flatnonzero(numbers == number)) for number in set(numbers.tolist())]
        found = [file.ends_between(starts[here], starts[here] + used[here]) for file, here in files]
        owner = np.concatenate([np.repeat(here, n) for (_, here), (_, n) in zip(files, found, strict=True)])
        order = np.argsort(owner, kind="stable")
        ends = np.concatenate([ends for ends, _ in found])[order] - starts[owner[order]]
        rows = Rows.empty(used, ends, np.bincount(owner, minlength=len(packs)), self.pack_len)
        counts = np.minimum(left, self.pack_len + 1)
        for file, here in files:
            rows.read(file, here * (self.pack_len + 1), starts[here], counts[here])
        return rows

    def pieces(self, pack: int) -> list[Piece]:
        number = int(np.searchsorted(self.limits, pack, side="right")) - 1
        file, start = self.files[number], (pack - int(self.limits[number])) * self.pack_len
        stop = min(start + self.pack_len, file.n_tokens)
        ends, _ = file.ends_between(np.array([start]), np.array([stop]))
        limits = sorted({start, *ends.tolist(), stop})
        return [Piece(file, a, b - a, b in ends) for a, b in pairwise(limits)]

    def waste(self) -> tuple[float, float]:
        offsets = _first_offsets(self.files)
        starts, ends = offsets[0], offsets[1]
        cut = (starts // self.pack_len < (ends - 1) // self.pack_len) & (ends > starts)
        total = sum(file.n_tokens for file in self.files)
        return 1 - total / max(1, self.n_packs * self.pack_len), float(cut.mean()) if len(cut) else 0.0


class Table(NamedTuple):
    """Parts of documents, pack after pack."""

    n_pieces: np.ndarray  # of each pack
    files: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray  # bool: the document ends there


class Pieces(ABC):
    """A layout whose packs are made of parts of documents from anywhere."""

    files: list[Tokens]
    pack_len: int

    @abstractmethod
    def table(self, packs: np.ndarray) -> Table:
        """Give the parts of packs, in order."""

    def pieces(self, pack: int) -> list[Piece]:
        found = zip(*(column.tolist() for column in self.table(np.array([pack]))[1:]), strict=True)
        return [Piece(self.files[file], start, length, bool(end)) for file, start, length, end in found]

    def rows(self, packs: np.ndarray) -> Rows:
        n_pieces, files, starts, lengths, ended = self.table(packs)
        row = np.repeat(np.arange(len(packs)), n_pieces)
        stops = np.cumsum(lengths)
        used = np.bincount(row, lengths, minlength=len(packs)).astype(np.int64)
        at = stops - lengths - (np.cumsum(used) - used)[row]
        n_ends = np.bincount(row[ended], minlength=len(packs))
        rows = Rows.empty(used, (at + lengths)[ended], n_ends, self.pack_len)
        places = row * (self.pack_len + 1) + at
        for number in set(files.tolist()):
            here = files == number
            rows.read(self.files[number], places[here], starts[here], (lengths + ~ended)[here])
        return rows


def _expand(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Give first, first + 1, ... for each of several ranges, one after the other."""
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(firsts - before, counts)


class Shuffled(Pieces):
    """Documents in a shuffled order that is the same in every epoch, end to end, cut every `pack_len` tokens.

    InternLM's `PackedDataset` and `PackedDatasetWithoutCuSeqlen` (v0.2.1), which leave out what does not fill
    a pack; with `padded` it is kept. 16 bytes of memory a document. Unlike theirs, token 0 is a token like
    any other: it can be a target.
    """

    def __init__(self, files: list[Tokens], pack_len: int, *, seed: int | None, padded: bool) -> None:
        self.files, self.pack_len = files, pack_len
        offsets = [file.all_offsets() for file in files]
        self.file = np.repeat(np.arange(len(files)), [len(o) - 1 for o in offsets])
        self.start = np.concatenate([o[:-1] for o in offsets]) if offsets else np.zeros(0, dtype=np.int64)
        self.length = np.concatenate([np.diff(o) for o in offsets]) if offsets else np.zeros(0, dtype=np.int64)
        self.order = np.arange(len(self.start))
        if seed is not None:
            np.random.RandomState(seed).shuffle(self.order)
        self.limits = np.concatenate([[0], np.cumsum(self.length[self.order])])
        self.n_tokens = int(self.limits[-1])
        self.n_packs = -(-self.n_tokens // pack_len) if padded else self.n_tokens // pack_len

    def table(self, packs: np.ndarray) -> Table:
        begin = packs * self.pack_len
        stop = np.minimum(begin + self.pack_len, self.n_tokens)
        first = np.searchsorted(self.limits, begin, side="right") - 1
        counts = np.searchsorted(self.limits, stop, side="left") - first
        slots = _expand(first, counts)
        low = np.maximum(self.limits[slots], np.repeat(begin, counts))
        high = np.minimum(self.limits[slots + 1], np.repeat(stop, counts))
        kept = high > low  # empty documents are in no pack
        n_pieces = np.bincount(np.repeat(np.arange(len(packs)), counts)[kept], minlength=len(packs))
        slots, low, high = slots[kept], low[kept], high[kept]
        documents = self.order[slots]
        starts = self.start[documents] + low - self.limits[slots]
        return Table(n_pieces, self.file[documents], starts, high - low, high == self.limits[slots + 1])

    def waste(self) -> tuple[float, float]:
        starts, ends = self.limits[:-1], self.limits[1:]
        cut = (starts // self.pack_len < (ends - 1) // self.pack_len) & (ends > starts)
        used = min(self.n_tokens, self.n_packs * self.pack_len)
        return 1 - used / max(1, self.n_packs * self.pack_len), float(cut.mean()) if len(cut) else 0.0


class BestFit(Pieces):
    """Documents whole, each in the fullest pack that has room for it, the longest first; longer ones are cut.

    Best-fit-decreasing packing of "Fewer Truncations Improve Language Modeling" (Ding et al. 2024), within
    each file. The plan is made once and kept beside the tokens.
    """

    def __init__(self, files: list[Tokens], pack_len: int) -> None:
        self.files, self.pack_len = files, pack_len
        self.plans = [Plan(file, pack_len) for file in files]
        self.limits = np.cumsum([0, *(plan.n_packs for plan in self.plans)])
        self.n_packs = int(self.limits[-1])

    def table(self, packs: np.ndarray) -> Table:
        numbers = np.searchsorted(self.limits, packs, side="right") - 1
        places, n_pieces = packs - self.limits[numbers], np.empty_like(packs)
        lines: dict[int, np.ndarray] = {}
        for number in set(numbers.tolist()):
            here = numbers == number
            n_pieces[here], lines[number] = self.plans[number].lines(places[here])
        files = np.repeat(numbers, n_pieces)
        found = np.empty((len(files), LINE), dtype=np.int64)
        for number, its in lines.items():
            found[files == number] = its
        return Table(n_pieces, files, found[:, 0], found[:, 1], found[:, 2].astype(bool))

    def waste(self) -> tuple[float, float]:
        total = sum(file.n_tokens for file in self.files)
        documents, cut = sum(plan.n_documents for plan in self.plans), sum(plan.n_cut for plan in self.plans)
        return 1 - total / max(1, self.n_packs * self.pack_len), cut / max(1, documents)


class RandomTokens:
    """Packs of uniformly random tokens, each a pure function of its number."""

    def __init__(self, *, vocab_size: int, pack_len: int, seq_len: int, seed: int, n_packs: int) -> None:
        self.vocab_size, self.pack_len, self.seq_len, self.seed, self.n_packs = (
            vocab_size,
            pack_len,
            seq_len,
            seed,
            n_packs,
        )

    def rows(self, packs: np.ndarray) -> Rows:
        ends = np.arange(self.seq_len, self.pack_len + 1, self.seq_len)
        used, n_ends = np.full(len(packs), self.pack_len), np.full(len(packs), len(ends))
        rows = Rows.empty(used, np.tile(ends, len(packs)), n_ends, self.pack_len)
        for row, pack in enumerate(packs.tolist()):
            rows.tokens[row, :-1] = np.random.default_rng((self.seed, pack)).integers(0, self.vocab_size, self.pack_len)
        return rows

    def pieces(self, pack: int) -> list[Piece]:
        return []

    def waste(self) -> tuple[float, float]:
        return 0.0, 0.0


def layout_of(files: list[Tokens], packing: Packing, pack_len: int, *, seed: int, train: bool) -> Layout:
    """Lay out a source's files; validation keeps InternLM's packings in order and whole."""
    match packing:
        case Packing.concat:
            return Concat(files, pack_len)
        case Packing.best_fit:
            return BestFit(files, pack_len)
        case Packing.internlm | Packing.internlm_one:
            return Shuffled(files, pack_len, seed=seed if train else None, padded=not train)


def _first_offsets(files: list[Tokens]) -> tuple[np.ndarray, np.ndarray]:
    """Give the beginnings and ends of the first documents of a source, each in its file."""
    starts, ends, counted = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)], 0
    for file in files:
        if counted < COUNTED_DOCUMENTS:
            offsets = file.all_offsets()
            starts.append(offsets[:-1])
            ends.append(offsets[1:])
            counted += file.n_documents
    return np.concatenate(starts), np.concatenate(ends)
