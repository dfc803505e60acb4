"""SentencePiece BPE several times faster, with the same ids: each word is encoded once and its ids are cached.

A merge only ever creates a piece of the vocabulary. If no piece can span a position in a text, the text can be
split there and the parts, called words here, encoded separately. The split points are derived from the pieces.
All work per character or word is vectorised in numpy over a hundred kilobytes of text.
"""

import re
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Any

import numpy as np

SPACE = "\u2581"  # how SentencePiece, and Hugging Face's Metaspace, write a space
LONGEST_TEXT = 1 << 20  # characters; a longer text is split between words
TOGETHER = 1 << 17  # characters of short texts that are encoded in one batch
CACHED_WORDS, CACHED_IDS = 1 << 21, 1 << 23  # about 120 MB with the hash table
LONGEST_WORD = 64  # characters; longer words are not cached
PAIR_BITS, SLOT_BITS = 20, 23
FACTOR = np.uint64(0x9E3779B97F4A7C15)


class CachedBPE:
    """Encodes texts word by word to the ids of `model.encode`.

    A text is split between two characters that are adjacent in no piece, and before an indent that is followed
    by a word if every piece that spans a newline and an indent continues with another newline. Words are looked
    up by a 64-bit hash; among a million words the probability of a collision is 3e-8.

    Args:
        model: a SentencePiece BPE model with byte fallback whose only normalization is spaces to `SPACE`.
        pieces: the model's pieces that can occur in a text.
    """

    def __init__(self, model: Any, pieces: list[str]) -> None:
        self.model = model
        pieces = [piece.replace(SPACE, " ") for piece in pieces]
        pairs = np.array([[ord(a), ord(b)] for piece in pieces for a, b in pairwise(piece)], dtype=np.uint32)
        # Indexed by a hash of the pair. A collision only misses a split, which does not change the ids.
        self.apart = np.ones(1 << PAIR_BITS, dtype=bool)
        if len(pairs):
            self.apart[_pair(pairs[:, 0], pairs[:, 1])] = False
        across = re.compile("\n[ \t]+(?![ \t\n\r])")
        self.split_before_indents = not any(across.search(piece) for piece in pieces)
        self.powers = np.multiply.accumulate(np.full(LONGEST_TEXT + TOGETHER, FACTOR))
        self._clear()

    def _clear(self) -> None:
        # Per word: offset and number of its ids. Sized beyond the limits by the words of one batch.
        self.n_words = self.n_ids = 0
        self.first, self.counts = np.zeros((2, CACHED_WORDS + len(self.powers)), dtype=np.int32)
        self.ids = np.zeros(CACHED_IDS + 4 * len(self.powers), dtype=np.uint32)
        # Hash table of words with open addressing; key 0 is an empty slot.
        self.slot_keys = np.zeros(1 << SLOT_BITS, dtype=np.uint64)
        self.slot_words = np.zeros(1 << SLOT_BITS, dtype=np.int32)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Return each text's ids, uint32."""
        found: list[np.ndarray] = []
        group: list[str] = []
        size = 0
        for text in texts:
            if size > TOGETHER or len(text) > LONGEST_TEXT:
                found += self._encode(group)
                group, size = [], 0
            if len(text) > LONGEST_TEXT:
                parts = [*self._parts(text)]
                ids = self.encode(parts) if len(parts) > 1 else [self.model.encode(text)]  # a single long word
                found.append(np.concatenate(ids, dtype=np.uint32, casting="unsafe"))
            else:
                group.append(text)
                size += len(text)
        return found + self._encode(group)

    def _parts(self, text: str) -> Iterator[str]:
        """Yield parts of at most `LONGEST_TEXT` characters, longer only if a word is."""
        start, size = 0, LONGEST_TEXT
        while len(text) - start > size:
            if split := self.last_split(text[start : start + size]):
                yield text[start : start + split]
                start, size = start + split, LONGEST_TEXT
            else:
                size *= 2
        yield text[start:]

    def last_split(self, text: str) -> int:
        """Return the start of the last word, searched in the last characters first."""
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
        keys[long] = long + 1  # unique in the batch: hash collisions of long words can be constructed
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
        """Return the starts of words in concatenated texts; chars: code points, uint32 (N,); limits: ends of texts."""
        split = self.apart[_pair(chars[:-1], chars[1:])]
        if self.split_before_indents:
            indent = (chars == 32) | (chars == 9)
            lasts = np.flatnonzero(indent[:-1] > indent[1:])  # last character of each indent
            lines = np.flatnonzero((chars[:-1] == 10) & indent[1:])
            lines = lines[: np.searchsorted(lines, lasts[-1])] if len(lasts) else lines[:0]
            following = chars[lasts[np.searchsorted(lasts, lines + 1)] + 1]
            split[lines[(following != 10) & (following != 13)]] = True
        inside = limits[(limits > 0) & (limits < len(chars))]
        split[inside - 1] = True
        return np.concatenate([[0], np.flatnonzero(split) + 1])

    def _find(self, keys: np.ndarray) -> np.ndarray:
        """Return the indices of words by key, -1 if not cached."""
        words = np.full(len(keys), -1, dtype=np.int32)
        left, slots = np.arange(len(keys)), _slot(keys)
        while len(left):
            there = self.slot_keys[slots]
            hit = there == keys[left]
            words[left[hit]] = self.slot_words[slots[hit]]
            probe = ~hit & (there != 0)
            left, slots = left[probe], (slots[probe] + 1) & ((1 << SLOT_BITS) - 1)
        return words

    def _add(self, text: str, keys: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Encode words that are not cached; return their indices."""
        keys, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        starts, ends = starts[first], ends[first]
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
        return numbers[inverse]

    def _insert(self, keys: np.ndarray, words: np.ndarray) -> None:
        slots = _slot(keys)
        while len(keys):
            free = self.slot_keys[slots] == 0
            self.slot_keys[slots[free]] = keys[free]  # of several keys for one slot, the last wins
            taken = free & (self.slot_keys[slots] == keys)
            self.slot_words[slots[taken]] = words[taken]
            keys, words, slots = keys[~taken], words[~taken], (slots[~taken] + 1) & ((1 << SLOT_BITS) - 1)


def _chars(text: str) -> np.ndarray:
    """Return code points, uint32; `SPACE` itself counts as a space, as in the model."""
    return np.frombuffer(text.replace(SPACE, " ").encode("utf-32-le"), dtype=np.uint32)


def _pair(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left * np.uint32(0x9E3779B1) + right * np.uint32(0x85EBCA6B)) >> np.uint32(32 - PAIR_BITS)


def _slot(keys: np.ndarray) -> np.ndarray:
    return ((keys * FACTOR) >> np.uint64(64 - SLOT_BITS)).astype(np.int64)
