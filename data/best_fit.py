"""Best-fit packing, planned once per token file and cached next to it."""

import os
import secrets
import struct
from bisect import bisect_left, insort
from pathlib import Path

import numpy as np
import xxhash

from data.shards import FileReader, TokenFile

HEADER = struct.Struct("<8s16sQQ")  # magic, hash of the inputs, number of packs, number of pieces
MAGIC = b"BESTFIT3"
COLUMNS = 4  # of a piece: start, length, is the start of a document, is the end of a document
PIECE_BYTES = 8 * COLUMNS


class Plan:
    """The packs of a token file; planned again if the file has changed or the plan is damaged."""

    def __init__(self, file: TokenFile, pack_len: int) -> None:
        path = Path(f"{file.stem}.fit-{pack_len}")
        inputs = xxhash.xxh3_128_digest(f"{file.fingerprint()}/{pack_len}".encode())
        self.reader, self.in_memory = FileReader(path), b""  # in_memory: if the folder is read-only
        n_bytes = path.stat().st_size if path.exists() else 0
        if n_bytes >= HEADER.size:
            magic, stored, self.n_packs, n_pieces = HEADER.unpack(self._read(0, HEADER.size))
            if (magic, stored) == (MAGIC, inputs) and n_bytes == self._pieces_at() + PIECE_BYTES * n_pieces:
                return
            self.reader = FileReader(path)  # of the new plan
        pieces, firsts = best_fit(file.offsets(), pack_len, truncate=file.conversations)
        self.n_packs = len(firsts) - 1
        raw = HEADER.pack(MAGIC, inputs, self.n_packs, len(pieces)) + firsts.tobytes() + pieces.tobytes()
        if not os.access(path.parent, os.W_OK):
            self.in_memory = raw
            return
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        partial.write_bytes(raw)
        partial.rename(path)

    def read(self, packs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of pieces per pack, int64 (N,), and the pieces, int64 (n_pieces, COLUMNS)."""
        limits = b"".join([self._read(HEADER.size + 8 * pack, 16) for pack in packs.tolist()])
        first, last = np.frombuffer(limits, dtype="<i8").reshape(-1, 2).T
        at, ranges = self._pieces_at(), zip(first.tolist(), last.tolist(), strict=True)
        lines = b"".join([self._read(at + PIECE_BYTES * a, PIECE_BYTES * (b - a)) for a, b in ranges])
        return last - first, np.frombuffer(lines, dtype="<i8").reshape(-1, COLUMNS)

    def _pieces_at(self) -> int:
        return HEADER.size + 8 * (self.n_packs + 1)

    def _read(self, at: int, n_bytes: int) -> bytes | bytearray:
        return self.in_memory[at : at + n_bytes] if self.in_memory else self.reader.read(at, n_bytes)


def best_fit(offsets: np.ndarray, pack_len: int, *, truncate: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Pack the documents between `offsets`, int64 (n + 1,); `truncate` drops what exceeds a pack instead of splitting.

    Returns the pieces by pack, int64 (n_pieces, COLUMNS), and the first piece of each pack, int64 (n_packs + 1,).
    """
    lengths = np.diff(offsets)
    whole, rests = np.divmod(np.minimum(lengths, pack_len) if truncate else lengths, pack_len)
    # Parts of pack_len tokens fill a pack each; the remainders of documents are packed best-fit.
    long = np.repeat(np.arange(len(lengths)), whole)
    within = np.arange(len(long)) - np.repeat(np.cumsum(whole) - whole, whole)
    ends = (within + 1) * pack_len == lengths[long]
    full = np.stack([offsets[long] + within * pack_len, np.full(len(long), pack_len), within == 0, ends], axis=1)
    small = np.flatnonzero(rests)
    small = small[np.argsort(-rests[small], kind="stable")]
    packs: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # packs by free tokens
    rooms: list[int] = []  # sorted keys of by_room
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
