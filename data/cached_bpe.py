"""SentencePiece's ids at several times its speed: each word is encoded once and its ids are cached.

A byte-pair merge joins two neighbours only into a piece of the vocabulary. Where no piece can lie across
a place in a text, the text may be split there and its parts, here called words, encoded apart: the ids are
those of the whole. Where that is so is derived from the pieces. Everything that is done per character or word
is done by numpy on a hundred kilobytes of text at once.
"""

import re
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Any

import numpy as np

SPACE = "\u2581"  # how SentencePiece, and Hugging Face's Metaspace, write a space
LONGEST_TEXT = 1 << 20  # characters that are encoded at once; a longer text is split between words
TOGETHER = 1 << 17  # characters of short texts that are encoded at once
CACHED_WORDS, CACHED_IDS = 1 << 21, 1 << 23  # with the hash table about 120 MB
LONGEST_WORD = 64  # characters of a word that is cached
PAIR_BITS, SLOT_BITS = 20, 23
FACTOR = np.uint64(0x9E3779B97F4A7C15)


class CachedBPE:
    """Encodes texts by words, with the ids of `model.encode`.

    A text is split wherever no piece holds the two characters side by side, and before an indent that leads
    to a word: the pieces that go on from a line end over its indent do so to another line end. A word is
    known by a 64-bit hash of it; two of a million words share one with a probability of 3e-8.

    Args:
        model: a SentencePiece BPE model with byte fallback that changes nothing of a text but spaces to `SPACE`.
        pieces: its pieces that can be part of a text.
    """

    def __init__(self, model: Any, pieces: list[str]) -> None:
        self.model = model
        pieces = [piece.replace(SPACE, " ") for piece in pieces]
        pairs = np.array([[ord(a), ord(b)] for piece in pieces for a, b in pairwise(piece)], dtype=np.uint32)
        # All pairs of characters, hashed: where two share a slot a split is missed, and the ids are the same.
        self.apart = np.ones(1 << PAIR_BITS, dtype=bool)
        if len(pairs):
            self.apart[_pair(pairs[:, 0], pairs[:, 1])] = False
        across = re.compile("\n[ \t]+(?![ \t\n\r])")
        self.split_before_indents = not any(across.search(piece) for piece in pieces)
        self.powers = np.multiply.accumulate(np.full(LONGEST_TEXT + TOGETHER, FACTOR))
        self._clear()

    def _clear(self) -> None:
        # Words by number: where their ids begin, and how many they are. More than are kept, for those of one text.
        self.n_words = self.n_ids = 0
        self.first, self.counts = np.zeros((2, CACHED_WORDS + len(self.powers)), dtype=np.int32)
        self.ids = np.zeros(CACHED_IDS + 4 * len(self.powers), dtype=np.uint32)
        # Their hash table, with open addressing: a key of 0 is an empty slot.
        self.slot_keys = np.zeros(1 << SLOT_BITS, dtype=np.uint64)
        self.slot_words = np.zeros(1 << SLOT_BITS, dtype=np.int32)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Return each text's ids, uint32; of texts of any length."""
        found: list[np.ndarray] = []
        group: list[str] = []
        size = 0
        for text in texts:
            if size > TOGETHER or len(text) > LONGEST_TEXT:
                found += self._encode(group)
                group, size = [], 0
            if len(text) > LONGEST_TEXT:
                parts = [*self._parts(text)]
                its = self.encode(parts) if len(parts) > 1 else [self.model.encode(text)]  # perhaps one long word
                found.append(np.concatenate(its, dtype=np.uint32, casting="unsafe"))
            else:
                group.append(text)
                size += len(text)
        return found + self._encode(group)

    def _parts(self, text: str) -> Iterator[str]:
        """Yield parts of at most `LONGEST_TEXT` characters, and longer ones where a word is longer."""
        start, size = 0, LONGEST_TEXT
        while len(text) - start > size:
            if split := self.last_split(text[start : start + size]):
                yield text[start : start + split]
                start, size = start + split, LONGEST_TEXT
            else:
                size *= 2
        yield text[start:]

    def last_split(self, text: str) -> int:
        """Return the last place where a word begins, 0 if the text is one."""
        for size in (1 << 12, len(text)):
            chars = _chars(text[-size:])
            if start := int(self.splits(chars, np.array([len(chars)]))[-1]):
                return len(text) - len(chars) + start
        return 0

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        text = "".join(texts)
        if not text:
            return [np.zeros(0, dtype=np.uint32) for _ in texts]
        if self.n_words > CACHED_WORDS or self.n_ids > CACHED_IDS:
            self._clear()
        chars = _chars(text)
        limits = np.cumsum([len(text) for text in texts])
        starts = self.splits(chars, limits)
        ends = np.append(starts[1:], len(chars))
        sums = np.zeros(len(chars) + 1, dtype=np.uint64)
        np.cumsum((chars + np.uint64(1)) * self.powers[: len(chars)], out=sums[1:])
        keys = (sums[ends] - sums[starts]) * self.powers[len(self.powers) - 1 - starts]
        long = np.flatnonzero(ends - starts > LONGEST_WORD)
        keys[long] = long + 1  # each for itself: long words can be made to share a hash
        words = self._find(keys)
        missing = np.flatnonzero(words < 0)
        if len(missing):
            words[missing] = self._add(text, keys[missing], starts[missing], ends[missing])
        counts = self.counts[words]
        done = np.cumsum(counts)
        ids = self.ids[np.repeat(self.first[words] - done + counts, counts) + np.arange(done[-1])]
        before = np.concatenate([[0], done])
        return np.split(ids, before[np.searchsorted(starts, limits[:-1])])

    def splits(self, chars: np.ndarray, limits: np.ndarray) -> np.ndarray:
        """Return where words begin in texts end to end; chars: uint32 (N,), code points; limits: where texts end."""
        split = self.apart[_pair(chars[:-1], chars[1:])]
        if self.split_before_indents:
            indent = (chars == 32) | (chars == 9)
            lasts = np.flatnonzero(indent[:-1] > indent[1:])  # of the indents that something follows
            lines = np.flatnonzero((chars[:-1] == 10) & indent[1:])
            lines = lines[: np.searchsorted(lines, lasts[-1])] if len(lasts) else lines[:0]
            following = chars[lasts[np.searchsorted(lasts, lines + 1)] + 1]
            split[lines[(following != 10) & (following != 13)]] = True
        inside = limits[(limits > 0) & (limits < len(chars))]
        split[inside - 1] = True
        return np.concatenate([[0], np.flatnonzero(split) + 1])

    def _find(self, keys: np.ndarray) -> np.ndarray:
        """Return the numbers of words, -1 where one is not cached."""
        words = np.full(len(keys), -1, dtype=np.int32)
        left, slots = np.arange(len(keys)), _slot(keys)
        while len(left):
            there = self.slot_keys[slots]
            hit = there == keys[left]
            words[left[hit]] = self.slot_words[slots[hit]]
            on = ~hit & (there != 0)
            left, slots = left[on], (slots[on] + 1) & ((1 << SLOT_BITS) - 1)
        return words

    def _add(self, text: str, keys: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Encode words that are not cached, and return their numbers."""
        keys, one, which = np.unique(keys, return_index=True, return_inverse=True)
        starts, ends = starts[one], ends[one]
        new = [text[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
        encoded = self.model.encode(new, num_threads=1)
        numbers = np.arange(self.n_words, self.n_words + len(keys), dtype=np.int32)
        counts = np.array([len(ids) for ids in encoded])
        self.counts[numbers] = counts
        self.first[numbers] = self.n_ids + np.cumsum(counts) - counts
        self.ids[self.n_ids : self.n_ids + counts.sum()] = np.fromiter(chain.from_iterable(encoded), dtype=np.uint32)
        self.n_words += len(keys)
        self.n_ids += int(counts.sum())
        kept = ends - starts <= LONGEST_WORD
        self._insert(keys[kept], numbers[kept])
        return numbers[which]

    def _insert(self, keys: np.ndarray, words: np.ndarray) -> None:
        slots = _slot(keys)
        while len(keys):
            free = self.slot_keys[slots] == 0
            self.slot_keys[slots[free]] = keys[free]  # of several for one slot the last is written
            taken = free & (self.slot_keys[slots] == keys)
            self.slot_words[slots[taken]] = words[taken]
            keys, words, slots = keys[~taken], words[~taken], (slots[~taken] + 1) & ((1 << SLOT_BITS) - 1)


def _chars(text: str) -> np.ndarray:
    """Return code points, uint32; a written-out `SPACE` is a space, as it is to the model."""
    return np.frombuffer(text.replace(SPACE, " ").encode("utf-32-le"), dtype=np.uint32)


def _pair(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left * np.uint32(0x9E3779B1) + right * np.uint32(0x85EBCA6B)) >> np.uint32(32 - PAIR_BITS)


def _slot(keys: np.ndarray) -> np.ndarray:
    return ((keys * FACTOR) >> np.uint64(64 - SLOT_BITS)).astype(np.int64)
