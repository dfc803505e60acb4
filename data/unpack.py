"""Files opened for what is in them, whatever they are packed with, here or in an object store."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

PACKED = (".gz", ".zst", ".xz", ".bz2")
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError, lzma.LZMAError)
PACKED_BYTES = 1 << 17  # read at once of a .zst


def kind_of(path: str) -> str:
    """Give the suffix that says what a file holds: .jsonl of a.jsonl.gz."""
    name = Path(path)
    return Path(name.stem).suffix if name.suffix in PACKED else name.suffix


def open_raw(path: str) -> Any:
    """Open a file or an address for its bytes as they lie."""
    if "://" not in path:
        return open(path, "rb")
    import fsspec

    return fsspec.open(path, "rb").open()  # type: ignore[union-attr]


@contextmanager
def unpacked(path: str) -> Iterator[IO[bytes]]:
    """Open a file for its content, unpacked."""
    with open_raw(path) as raw:
        match Path(path).suffix:
            case ".gz":
                file: Any = gzip.open(raw)  # noqa: SIM115
            case ".bz2":
                file = bz2.open(raw)  # noqa: SIM115
            case ".xz":
                file = lzma.open(raw)  # noqa: SIM115
            case ".zst":
                file = io.BufferedReader(_Zstandard(raw))
            case _:
                file = raw
        with file:
            yield file


class _Zstandard(io.RawIOBase):
    """Reads Zstandard frames; unlike `zstandard.open` it tells when the last one is cut short."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.frames = file, zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self.frame: Any = None
        self.packed = self.plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.plain:
            self.packed = self.packed or self.file.read(PACKED_BYTES)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self.frame = self.frame or self.frames.decompressobj()
            self.plain = self.frame.decompress(self.packed)
            self.packed = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        count = min(len(buffer), len(self.plain))
        buffer[:count], self.plain = self.plain[:count], self.plain[count:]
        return count
