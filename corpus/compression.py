"""Files opened for their content, whatever they are compressed with, on this machine or in an object store."""

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import IO, Any

import zstandard

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
# What reading a damaged or truncated file raises; gzip and bz2 also raise an OSError without a number.
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
ZSTD_READ_BYTES = 1 << 12  # decompressed at once: at most some 40 MB, of the most repetitive text


def split_suffix(path: str) -> tuple[str, str]:
    """Return the suffixes of content and compression: .jsonl and .gz of A.JSONL.gz."""
    name = Path(path.lower())
    return (Path(name.stem).suffix, name.suffix) if name.suffix in COMPRESSED else (name.suffix, "")


def open_content(path: str) -> Any:
    """Open a file or an fsspec address for its decompressed bytes."""
    if "://" in path:
        import fsspec

        raw: Any = fsspec.open(path, "rb").open()  # type: ignore[union-attr]
    else:
        raw = Path(path)
    match split_suffix(path)[1]:
        case ".gz":
            return gzip.open(raw)
        case ".xz":
            return lzma.open(raw)
        case ".bz2":
            return bz2.open(raw)
    raw = raw.open("rb") if isinstance(raw, Path) else raw
    return io.BufferedReader(ZstdFile(raw), 1 << 17) if split_suffix(path)[1] else raw


class ZstdFile(io.RawIOBase):
    """Zstandard frames one after another. The package's own reader takes a truncated file for a complete one."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw = raw
        self.frame: Any = None
        self.unread, self.content = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self.content:
            packed = self.unread or self.raw.read(ZSTD_READ_BYTES)
            if not packed:
                if self.frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            if self.frame is None:
                self.frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self.content, self.unread = memoryview(self.frame.decompress(packed)), b""
            if self.frame.eof:
                self.unread, self.frame = self.frame.unused_data, None
        size = min(len(buffer), len(self.content))
        buffer[:size] = self.content[:size]
        self.content = self.content[size:]
        return size
