"""Best-fit packing: which parts of documents make each pack, planned once per file and kept beside the tokens."""

import os
import secrets
from bisect import bisect_left, insort
from contextlib import suppress
from pathlib import Path

import numpy as np
import xxhash

from data.shards import TokenFile

COLUMNS = 4  # of a piece: start, length, whether a document begins and whether one ends with it


class Plan:
    """The packs of a file of tokens; made anew when the file has changed or the plan is damaged.

    It is an array of int64, mapped into memory: a hash of what it was made of (2), the number of packs, the first
    piece of each and the end (n_packs + 1), and the pieces (n_pieces * COLUMNS).
    """

    def __init__(self, file: TokenFile, pack_len: int) -> None:
        path, flat = Path(f"{file.stem}.fit-{pack_len}"), np.zeros(2, dtype=np.int64)
        made_of = np.frombuffer(xxhash.xxh3_128_digest(f"{file.fingerprint()}/{pack_len}".encode()), dtype=np.int64)
        with suppress(FileNotFoundError, ValueError, EOFError):
            flat = np.load(path, mmap_mode="r")
        if not np.array_equal(flat[:2], made_of):
            pieces, firsts = best_fit(file.offsets(), pack_len, truncate=file.conversations)
            flat = np.concatenate([made_of, [len(firsts) - 1], firsts, pieces.reshape(-1)])
            if os.access(path.parent, os.W_OK):
                partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
                with open(partial, "wb") as opened:
                    np.save(opened, flat)
                partial.rename(path)
                flat = np.load(path, mmap_mode="r")
        self.n_packs = int(flat[2])
        self.firsts, pieces = np.split(flat[3:], [self.n_packs + 1])
        self.pieces = pieces.reshape(-1, COLUMNS)

    def read(self, packs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of pieces of each pack, int64 (N,), and the pieces, int64 (n_pieces, COLUMNS)."""
        first, last = self.firsts[packs], self.firsts[packs + 1]
        return last - first, np.concatenate([self.pieces[a:b] for a, b in zip(first, last, strict=True)])


def best_fit(offsets: np.ndarray, pack_len: int, *, truncate: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Pack documents that lie between `offsets`, int64 (n + 1,), into packs; `truncate`: only what fits in one each.

    Returns the pieces, pack after pack, int64 (n_pieces, COLUMNS), and the first piece of each pack, int64
    (n_packs + 1,).
    """
    lengths = np.diff(offsets)
    whole, rests = np.divmod(np.minimum(lengths, pack_len) if truncate else lengths, pack_len)
    # Parts of pack_len tokens are packs of their own; what is left of each document is fitted in.
    long = np.repeat(np.arange(len(lengths)), whole)
    within = np.arange(len(long)) - np.repeat(np.cumsum(whole) - whole, whole)
    ends = (within + 1) * pack_len == lengths[long]
    full = np.stack([offsets[long] + within * pack_len, np.full(len(long), pack_len), within == 0, ends], axis=1)
    small = np.flatnonzero(rests)
    small = small[np.argsort(-rests[small], kind="stable")]
    packs: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # packs with so many tokens left
    rooms: list[int] = []  # the keys of by_room, in order
    for document, length in zip(small.tolist(), rests[small].tolist(), strict=True):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            pack, room = len(packs), pack_len
            packs.append([])
        else:
            room = rooms[at]
            pack = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        packs[pack].append(document)
        if room > length:
            if room - length not in by_room:
                by_room[room - length] = []
                insort(rooms, room - length)
            by_room[room - length].append(pack)
    fitted = np.array([document for pack in packs for document in pack], dtype=np.int64)
    one = np.ones(len(fitted), dtype=np.int64)
    rest = np.stack([offsets[fitted + 1] - rests[fitted], rests[fitted], whole[fitted] == 0, one], axis=1)
    counts = np.array([1] * len(full) + [len(pack) for pack in packs], dtype=np.int64)
    return np.concatenate([full, rest]).astype(np.int64), np.concatenate([[0], np.cumsum(counts)])
