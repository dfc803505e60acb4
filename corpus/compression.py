"""Files opened for their content, whatever they are compressed with, on this machine or in an object store."""

import bz2
import gzip
import lzma
import zlib
from pathlib import Path
from typing import Any


def _open_zstd(raw: Any) -> Any:
    import pyarrow  # zstandard's own reader takes a truncated file for a complete one

    return pyarrow.CompressedInputStream(raw, "zstd")


OPENERS: dict[str, Any] = {".zst": _open_zstd, ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
# What reading a damaged or truncated file raises, besides an OSError without a number.
DAMAGE = (EOFError, zlib.error, lzma.LZMAError)


def split_suffix(path: str) -> tuple[str, str]:
    """Return the suffixes of content and compression: .jsonl and .gz of A.JSONL.gz."""
    name = Path(path.lower())
    return (Path(name.stem).suffix, name.suffix) if name.suffix in OPENERS else (name.suffix, "")


def open_content(path: str) -> Any:
    """Open a file or an fsspec address for its decompressed bytes."""
    raw: Any = path
    if "://" in path:
        import fsspec

        raw = fsspec.open(path, "rb").open()  # type: ignore[union-attr]
    if compression := split_suffix(path)[1]:
        return OPENERS[compression](raw)
    return open(path, "rb") if raw is path else raw
