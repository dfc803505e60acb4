"""Best-fit packing: which parts of documents make each pack, planned once per file and kept beside the tokens."""

import os
import secrets
import struct
from bisect import bisect_left, insort
from pathlib import Path

import numpy as np
import xxhash

from data.shards import FileReader, TokenFile

HEADER = struct.Struct("<8s16sQQ")  # magic, hash of what it was made of, packs, pieces
MAGIC = b"BESTFIT3"
COLUMNS = 4  # of a piece: start, length, whether a document begins and whether one ends with it
PIECE_BYTES = 8 * COLUMNS


class Plan:
    """The packs of a file of tokens; made anew when the file has changed or the plan is damaged."""

    def __init__(self, file: TokenFile, pack_len: int) -> None:
        path = Path(f"{file.stem}.fit-{pack_len}")
        made_of = xxhash.xxh3_128_digest(f"{file.fingerprint()}/{pack_len}".encode())
        self.reader, self.kept = FileReader(path), b""  # kept: the plan, where the folder is not writable
        n_bytes = path.stat().st_size if path.exists() else 0
        if n_bytes >= HEADER.size:
            magic, stored, self.n_packs, n_pieces = HEADER.unpack(self._read(0, HEADER.size))
            if (magic, stored) == (MAGIC, made_of) and n_bytes == self._pieces_at() + PIECE_BYTES * n_pieces:
                return
            self.reader = FileReader(path)  # of the file that comes in its place
        pieces, firsts = best_fit(file.offsets(), pack_len, truncate=file.conversations)
        self.n_packs = len(firsts) - 1
        raw = HEADER.pack(MAGIC, made_of, self.n_packs, len(pieces)) + firsts.tobytes() + pieces.tobytes()
        if not os.access(path.parent, os.W_OK):
            self.kept = raw
            return
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        partial.write_bytes(raw)
        partial.rename(path)

    def read(self, packs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of pieces of each pack, int64 (N,), and the pieces, int64 (n_pieces, COLUMNS)."""
        limits = b"".join([self._read(HEADER.size + 8 * pack, 16) for pack in packs.tolist()])
        first, last = np.frombuffer(limits, dtype="<i8").reshape(-1, 2).T
        at, ranges = self._pieces_at(), zip(first.tolist(), last.tolist(), strict=True)
        lines = b"".join([self._read(at + PIECE_BYTES * a, PIECE_BYTES * (b - a)) for a, b in ranges])
        return last - first, np.frombuffer(lines, dtype="<i8").reshape(-1, COLUMNS)

    def _pieces_at(self) -> int:
        return HEADER.size + 8 * (self.n_packs + 1)

    def _read(self, at: int, n_bytes: int) -> bytes | bytearray:
        return self.kept[at : at + n_bytes] if self.kept else self.reader.read(at, n_bytes)


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
