"""Opening of local and remote files, compressed or not."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

ZSTD_READ_BYTES = 1 << 12  # per decompression: at most about 40 MB of highly repetitive text


class ZstdFile(io.RawIOBase):
    """A reader of concatenated zstandard frames. Unlike the package's reader, it detects a truncated file."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw, self.parts, self.content = raw, _decompressed(raw), memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self.content:
            if (part := next(self.parts, None)) is None:
                return 0
            self.content = memoryview(part)
        size = min(len(buffer), len(self.content))
        buffer[:size], self.content = self.content[:size], self.content[size:]
        return size


def _decompressed(raw: IO[bytes]) -> Iterator[bytes]:
    frame: Any = None
    while packed := raw.read(ZSTD_READ_BYTES):
        while packed:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            yield frame.decompress(packed)
            packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("it ends within a frame")


def _open_zstd(raw: Any) -> Any:
    return io.BufferedReader(ZstdFile(open(raw, "rb") if isinstance(raw, str) else raw), 1 << 17)


OPENERS: dict[str, Any] = {".zst": _open_zstd, ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
# Exceptions of damaged or truncated files, besides OSError without errno.
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


def split_suffix(path: str) -> tuple[str, str]:
    """Return the suffixes of content and compression: (".jsonl", ".gz") for A.JSONL.gz."""
    name = Path(path.lower())
    return (Path(name.stem).suffix, name.suffix) if name.suffix in OPENERS else (name.suffix, "")


def open_content(path: str) -> Any:
    """Open a file or an fsspec URL for reading its decompressed bytes."""
    raw: Any = path
    if "://" in path:
        import fsspec

        raw = fsspec.open(path, "rb").open()  # type: ignore[union-attr]
    if compression := split_suffix(path)[1]:
        return OPENERS[compression](raw)
    return open(path, "rb") if raw is path else raw
