"""Documents placed whole where they fit best: which of their parts make each pack, kept beside the tokens."""

import os
import secrets
import struct
from bisect import bisect_left, insort
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from corpus.config import DataError

if TYPE_CHECKING:
    from data.packing import Tokens

HEADER = struct.Struct("<8s16sQQQQ")  # magic, what it was made of, packs, pieces, documents, documents cut
MAGIC = b"BESTFIT1"
LINE = 3  # numbers of a piece: where it starts, its length, and whether the document ends there


class Plan:
    """The packs of a file of tokens, made once; another file in its place, or a damaged plan, makes it anew.

    It is read, not mapped: a plan that is cut short meanwhile is an error, not a dead process.
    """

    def __init__(self, file: "Tokens", pack_len: int) -> None:
        self.path = Path(f"{file.stem}.fit-{pack_len}")
        self.descriptor: int | None = None
        self.kept: bytes | None = None  # where the folder is not ours to write in
        made_of = xxhash.xxh3_128_digest(f"{file.fingerprint()}/{pack_len}".encode())
        found = _read_header(self.path)
        if found is None or found[0] != made_of:
            offsets = file.all_offsets()
            pieces, firsts = best_fit(offsets, pack_len)
            n_cut = int((np.diff(offsets) > pack_len).sum())
            found = (made_of, len(firsts) - 1, len(pieces), len(offsets) - 1, n_cut)
            self._keep(HEADER.pack(MAGIC, *found) + firsts.tobytes() + pieces.tobytes())
        _, self.n_packs, self.n_pieces, self.n_documents, self.n_cut = found

    def _keep(self, raw: bytes) -> None:
        if not os.access(self.path.parent, os.W_OK):
            self.kept = raw
            return
        partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}.partial")
        partial.write_bytes(raw)
        partial.rename(self.path)

    def lines(self, packs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give how many pieces some packs have, int64 (N,), and the pieces, int64 (n_pieces, LINE)."""
        limits = b"".join([self._read(HEADER.size + 8 * pack, 16) for pack in packs.tolist()])
        first, last = np.frombuffer(limits, dtype="<i8").reshape(-1, 2).T
        at, size = HEADER.size + 8 * (self.n_packs + 1), 8 * LINE
        ranges = zip(first.tolist(), last.tolist(), strict=True)
        lines = b"".join([self._read(at + size * a, size * (b - a)) for a, b in ranges])
        return last - first, np.frombuffer(lines, dtype="<i8").reshape(-1, LINE)

    def _read(self, at: int, size: int) -> bytes:
        if self.kept is not None:
            return self.kept[at : at + size]
        if self.descriptor is None:
            self.descriptor = os.open(self.path, os.O_RDONLY)
        raw = os.pread(self.descriptor, size, at)
        if len(raw) != size:
            raise DataError(f"{self.path} was cut short while it was in use; remove it, and it is made again")
        return raw

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "descriptor": None}

    def __del__(self) -> None:
        if self.__dict__.get("descriptor") is not None:
            os.close(self.__dict__["descriptor"])


def _read_header(path: Path) -> tuple[bytes, int, int, int, int] | None:
    """Read what a plan was made of, and its counts; None if there is none that is whole."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        raw = file.read(HEADER.size)
    if len(raw) != HEADER.size or not raw.startswith(MAGIC):
        return None
    _, made_of, n_packs, n_pieces, n_documents, n_cut = HEADER.unpack(raw)
    whole = path.stat().st_size == HEADER.size + 8 * (n_packs + 1 + LINE * n_pieces)
    return (made_of, n_packs, n_pieces, n_documents, n_cut) if whole else None


def best_fit(offsets: np.ndarray, pack_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack documents that lie between `offsets`, int64 (n + 1,), into packs of `pack_len` tokens.

    Gives the pieces, pack after pack, int64 (n_pieces, LINE), and the first piece of each pack, int64 (n_packs + 1,).
    """
    lengths = np.diff(offsets)
    whole, rests = np.divmod(lengths, pack_len)
    # Parts of pack_len tokens are packs of their own; what is left of each document is fitted in.
    long = np.repeat(np.arange(len(lengths)), whole)
    within = np.arange(len(long)) - np.repeat(np.cumsum(whole) - whole, whole)
    ends = (within + 1) * pack_len == lengths[long]
    full = np.stack([offsets[long] + within * pack_len, np.full(len(long), pack_len), ends], axis=1)
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
    rest = np.stack([offsets[fitted + 1] - rests[fitted], rests[fitted], np.ones(len(fitted), dtype=np.int64)], axis=1)
    counts = np.concatenate(
        [np.ones(len(full), dtype=np.int64), np.array([len(pack) for pack in packs], dtype=np.int64)]
    )
    return np.concatenate([full, rest]).astype(np.int64), np.concatenate([[0], np.cumsum(counts)])
