"""Tokens on disk: a flat little-endian `.bin`, int64 document offsets in `.idx`, a `.json` header."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data.config import DataError

FORMAT_VERSION = 1
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True, slots=True)
class Header:
    format_version: int
    dtype: str
    vocab_size: int
    tokenizer: str  # fingerprint
    documents: int
    tokens: int
    text_bytes: int
    max_token: int
    bin_hash: str  # xxh3_128 of the files
    idx_hash: str


class ShardWriter:
    """Appends documents to one shard; the header, written last, is what makes it one."""

    def __init__(self, stem: Path, *, vocab_size: int, tokenizer: str) -> None:
        self.stem, self.vocab_size, self.tokenizer = stem, vocab_size, tokenizer
        self.dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self.documents = self.tokens = self.text_bytes = self.max_token = 0
        stem.parent.mkdir(parents=True, exist_ok=True)
        self.bin = open(f"{stem}.bin", "wb")  # noqa: SIM115
        self.idx = open(f"{stem}.idx", "wb")  # noqa: SIM115
        self.bin_hash, self.idx_hash = xxhash.xxh3_128(), xxhash.xxh3_128()
        self._offset()

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Append a document of uint32 ids, whose text is `text_bytes` long."""
        if len(ids):
            self.max_token = max(self.max_token, int(ids.max()))
        if self.max_token >= self.vocab_size:
            raise DataError(f"{self.stem}.bin: token {self.max_token} is outside the vocabulary ({self.vocab_size})")
        raw = ids.astype(DTYPES[self.dtype]).tobytes()
        self.bin.write(raw)
        self.bin_hash.update(raw)
        self.documents += 1
        self.tokens += len(ids)
        self.text_bytes += text_bytes
        self._offset()

    def _offset(self) -> None:
        raw = np.array([self.tokens], dtype="<i8").tobytes()
        self.idx.write(raw)
        self.idx_hash.update(raw)

    def close_files(self) -> None:
        """Let go of the files, whether or not the shard is complete."""
        self.bin.close()
        self.idx.close()

    def close(self) -> Header:
        """Write the header and give it."""
        self.close_files()
        header = Header(
            format_version=FORMAT_VERSION,
            dtype=self.dtype,
            vocab_size=self.vocab_size,
            tokenizer=self.tokenizer,
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            max_token=self.max_token,
            bin_hash=self.bin_hash.hexdigest(),
            idx_hash=self.idx_hash.hexdigest(),
        )
        Path(f"{self.stem}.json").write_text(json.dumps(asdict(header), indent=2) + "\n")
        return header


class Shard:
    """A shard opened for reading; what the header says is checked against the files."""

    def __init__(self, stem: Path, *, verify: bool = False) -> None:
        self.stem = stem
        self.header = _read_header(Path(f"{stem}.json"))
        dtype = DTYPES[self.header.dtype]
        _check_size(Path(f"{stem}.bin"), self.header.tokens * dtype.itemsize)
        _check_size(Path(f"{stem}.idx"), (self.header.documents + 1) * 8)
        self.offsets = np.fromfile(f"{stem}.idx", dtype="<i8")
        if self.offsets[0] or self.offsets[-1] != self.header.tokens or (np.diff(self.offsets) < 0).any():
            raise DataError(f"{stem}.idx does not count from 0 up to the {self.header.tokens} tokens of its header")
        empty = self.header.tokens == 0  # an empty file cannot be mapped
        self.tokens: np.ndarray = np.zeros(0, dtype) if empty else np.memmap(f"{stem}.bin", dtype=dtype, mode="r")
        if verify:
            for name, expected in (("bin", self.header.bin_hash), ("idx", self.header.idx_hash)):
                if _file_hash(Path(f"{stem}.{name}")) != expected:
                    raise DataError(f"{stem}.{name} is not what was written: its hash differs from the header's")

    def document(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def _read_header(path: Path) -> Header:
    try:
        fields: Any = json.loads(path.read_text())
        header = Header(**fields)
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing, so the shard beside it is not complete; prepare the corpus again"
        ) from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is not a shard's header: {error}") from None
    if header.format_version != FORMAT_VERSION:
        raise DataError(
            f"{path}: format_version {header.format_version} is not {FORMAT_VERSION}; prepare the corpus again"
        )
    counts = (header.documents, header.tokens, header.vocab_size, header.max_token)
    if header.dtype not in DTYPES or not all(isinstance(n, int) and n >= 0 for n in counts):
        raise DataError(f"{path}: dtype ({header.dtype}) or counts {counts} are not a shard's")
    return header


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.exists() else -1
    if size != expected:
        found = "is missing" if size < 0 else f"has {size} bytes"
        raise DataError(f"{path} {found} where its header says {expected}: it was cut short or changed")


def _file_hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
