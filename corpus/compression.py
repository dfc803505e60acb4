"""Files opened for what is in them, whatever they are packed with, here or in an object store."""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import zstandard

STREAMS: dict[str, Callable[[], Any]] = {
    ".gz": partial(zlib.decompressobj, 16 + zlib.MAX_WBITS),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
    ".xz": lzma.LZMADecompressor,
    ".bz2": bz2.BZ2Decompressor,
}
PACKED = tuple(STREAMS)
BEGINNINGS = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".xz": b"\xfd7zXZ\0", ".bz2": b"BZh"}
NAMES = {".gz": "gzip", ".zst": "Zstandard", ".xz": "xz", ".bz2": "bzip2"}
PADDED = (".gz", ".xz")  # zeros may follow their streams
READ_BYTES = 1 << 17
PACKED_BYTES = 1 << 11  # unpacked at once: of the most repetitive text it is 20 MB


class DamageError(Exception):
    """A packed file that is cut short or is none, in words that its place goes before."""


def kind_of(path: str) -> str:
    """Give the suffix that says what a file holds: .jsonl of A.JSONL.gz."""
    name = Path(path.lower())
    return Path(name.stem).suffix if name.suffix in PACKED else name.suffix


def packing_of(path: str) -> str:
    """Give the suffix that says what a file is packed with, or nothing."""
    suffix = Path(path).suffix.lower()
    return suffix if suffix in PACKED else ""


def open_raw(path: str) -> Any:
    """Open a file or an address for its bytes as they lie."""
    if "://" not in path:
        return open(path, "rb")
    import fsspec

    return fsspec.open(path, "rb").open()  # type: ignore[union-attr]


@contextmanager
def unpacked(path: str) -> Iterator[Any]:
    """Open a file for its content, unpacked; what is packed has `read` alone."""
    packing = packing_of(path)
    with open_raw(path) as raw:
        yield Unpacked(raw, packing) if packing else raw


class Unpacked:
    """Reads streams that lie one after the other, of each a little at a time.

    What comes before the few kilobytes that a damage lies in is given, and then `read` raises `DamageError`. Python's
    own readers raise at once, and what follows a first stream of .xz or .bz2 and is none they take for the end.
    """

    def __init__(self, file: Any, packing: str) -> None:
        self.file, self.packing, self.begin = file, packing, STREAMS[packing]
        self.stream: Any = None
        self.head: bytes | None = None
        self.packed, self.plain = bytearray(), bytearray()
        self.padding, self.between = b"\0" if packing in PADDED else b"", b""
        self.failure: DamageError | None = None
        self.over = False

    def read(self, size: int) -> bytes:
        """Give `size` bytes, or those that are left."""
        while len(self.plain) < size and not self.over:
            if not self.packed:
                self.packed += self.file.read(READ_BYTES)
            if self.packed:
                self._unpack()
            else:
                self._end("it ends within a stream" if self.stream is not None else "")
        if self.failure is not None and not self.plain:
            raise self.failure
        data = bytes(self.plain[:size])
        del self.plain[:size]
        return data

    def _unpack(self) -> None:
        piece = bytes(self.packed[:PACKED_BYTES])
        self.head = piece if self.head is None else self.head
        del self.packed[:PACKED_BYTES]
        if self.stream is None:
            piece = piece.lstrip(self.between)
            if not piece:
                return
            self.stream = self.begin()
        try:
            self.plain += self.stream.decompress(piece)
        except (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError) as error:
            self._end(str(error))
            return
        if self.stream.eof:
            self.packed[:0] = self.stream.unused_data
            self.stream, self.between = None, self.padding

    def _end(self, reason: str) -> None:
        self.over = True
        head, known = self.head or b"", BEGINNINGS[self.packing]
        if reason and not head.startswith(known[: len(head)]):
            self.failure = DamageError(f"this is no {NAMES[self.packing]} file, as its suffix ({self.packing}) says")
        elif reason:
            self.failure = DamageError(f"the compressed file is damaged or cut short here ({reason})")
