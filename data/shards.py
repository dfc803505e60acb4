"""Token shards: a flat little-endian `.bin`, an `.idx` of its documents, a `.json` header.

The first two are Megatron-LM's format (`IndexedDataset`, version 1): its shards can be read here, and ours there. In
a corpus of conversations the highest bit of a token is its loss mask, set if the token is not a target.
"""

import hashlib
import json
import os
import struct
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from corpus.config import DataError

FORMAT_VERSION = 2
LOSS_MASKED = 1 << 31  # of uint32 tokens
SHARD_BYTES = 1 << 30  # size at which a shard is closed

MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, document offsets (documents + 1)
# Megatron's dtypes. There is no uint32, but ids below 2**31 have the same bytes as int32.
MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
SPARSE = 64  # every 64th document offset is kept in memory


@dataclass(slots=True)
class Header:
    format_version: int
    dtype: str
    vocab_size: int
    tokenizer: str  # fingerprint
    masked: bool  # tokens have a loss mask bit
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    max_token: int = 0
    bin_hash: str = ""  # xxh3_128 of the files
    idx_hash: str = ""


class ShardWriter:
    """Appends documents to one shard, which is complete when `close` has written the header."""

    def __init__(self, stem: Path, *, vocab_size: int, tokenizer: str, masked: bool = False) -> None:
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 and not masked else "<u4")
        self.stem, self.header = stem, Header(FORMAT_VERSION, self.dtype.name, vocab_size, tokenizer, masked)
        self.lengths, self.hash = [np.zeros(0, dtype="<i4")], xxhash.xxh3_128()
        stem.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(f"{stem}.bin", "wb")  # noqa: SIM115

    def add(self, ids: np.ndarray, lengths: np.ndarray, text_bytes: int) -> None:
        """Append concatenated documents; ids: uint32, lengths: tokens per document."""
        header = self.header
        tokens = ids & ~np.uint32(LOSS_MASKED) if header.masked else ids
        header.max_token = max(header.max_token, int(tokens.max(initial=0)))
        if header.max_token >= header.vocab_size:
            outside = f"token {header.max_token} is outside the vocabulary ({header.vocab_size})"
            raise DataError(f"{self.stem}.bin: {outside}")
        raw = ids.astype(self.dtype).tobytes()
        self.file.write(raw)
        self.hash.update(raw)
        self.lengths.append(lengths.astype("<i4"))
        header.documents += len(lengths)
        header.tokens += len(ids)
        header.text_bytes += text_bytes

    def close(self) -> Header:
        """Write the index and the header, with fsync, and return the header."""
        _close_synced(self.file)
        lengths, size = np.concatenate(self.lengths), self.dtype.itemsize
        index = (
            INDEX_HEADER.pack(MAGIC, 1, 8 if size == 2 else 4, len(lengths), len(lengths) + 1),
            lengths.tobytes(),
            ((np.cumsum(lengths, dtype="<i8") - lengths) * size).astype("<i8").tobytes(),
            np.arange(len(lengths) + 1, dtype="<i8").tobytes(),
        )
        raw = b"".join(index)
        _close_synced(open(f"{self.stem}.idx", "wb"), raw)  # noqa: SIM115
        self.header.bin_hash, self.header.idx_hash = self.hash.hexdigest(), xxhash.xxh3_128_hexdigest(raw)
        about = json.dumps(asdict(self.header), indent=2) + "\n"
        _close_synced(open(f"{self.stem}.json", "wb"), about.encode())  # noqa: SIM115
        return self.header


def _close_synced(file: IO[bytes], raw: bytes = b"") -> None:
    with file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


class FileReader:
    """Random access to a file, opened on first use and again in each worker process.

    Not memory-mapped: there, a file truncated while in use kills the process with SIGBUS.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.descriptor = Path(path), -1

    def read_into(self, buffer: memoryview | bytearray, at: int) -> None:
        """Fill a buffer from byte `at` on."""
        if self.descriptor < 0:
            self.descriptor = os.open(self.path, os.O_RDONLY)
        if os.preadv(self.descriptor, (buffer,), at) != len(buffer):
            raise DataError(f"{self.path} was truncated while it was in use")

    def read(self, at: int, n_bytes: int) -> bytearray:
        raw = bytearray(n_bytes)
        self.read_into(raw, at)
        return raw

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "descriptor": -1}

    def __del__(self) -> None:
        if self.__dict__.get("descriptor", -1) >= 0:
            os.close(self.descriptor)


class TokenFile(ABC):
    """The tokens of concatenated documents."""

    stem: Path  # the path without `.bin`
    n_tokens: int
    n_documents: int
    masked = False  # tokens have a loss mask bit
    conversations = False  # documents must be read from their start
    ends: np.ndarray | None = None  # cache of `ends_between`

    @abstractmethod
    def read_into(self, out: np.ndarray, places: list[int], starts: list[int], counts: list[int]) -> None:
        """Read ranges of tokens, loss mask bit included, to `places` in `out`, int32 (n,)."""

    @abstractmethod
    def offsets(self) -> np.ndarray:
        """Return the offsets of documents in tokens, int64 (n_documents + 1,)."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of the tokens and documents."""

    def read(self, start: int, n_tokens: int) -> np.ndarray:
        """Return `n_tokens` tokens from `start` on, int32."""
        out = np.empty(n_tokens, dtype=np.int32)
        if n_tokens:
            self.read_into(out, [0], [start], [n_tokens])
        return out

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of a document, int32."""
        start, end = self.offsets()[index : index + 2].tolist()
        return self.read(start, end - start)

    def ends_between(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the document ends in each range (start, stop], concatenated, and their number per range."""
        if self.ends is None:
            self.ends = np.unique(self.offsets())
        first, last = (np.searchsorted(self.ends, limits, side="right") for limits in (starts, stops))
        return np.concatenate([self.ends[a:b] for a, b in zip(first, last, strict=True)]), last - first


class Shard(TokenFile):
    """A shard opened for reading, ours or Megatron's.

    Raises `DataError` if the sizes do not match, or with `verify` the hashes of the files.
    """

    def __init__(self, stem: Path, *, verify: bool = False) -> None:
        self.stem, self.hashed = stem, ""
        self.bin, self.idx = FileReader(f"{stem}.bin"), FileReader(f"{stem}.idx")
        self.header = _read_header(Path(f"{stem}.json"))
        self.masked = self.conversations = self.header is not None and self.header.masked
        for file in (self.idx, self.bin):
            if not file.path.exists() or (file is self.idx and file.path.stat().st_size < INDEX_HEADER.size):
                raise _damaged(file.path)
        index_bytes, n_bytes = self.idx.path.stat().st_size, self.bin.path.stat().st_size
        magic, version, code, self.n_sequences, ends = INDEX_HEADER.unpack(self.idx.read(0, INDEX_HEADER.size))
        expected = INDEX_HEADER.size + self.n_sequences * 12 + ends * 8
        # Megatron's multimodal data has another byte per sequence.
        known = (magic, version) == (MAGIC, 1) and code in MEGATRON_TYPES
        if not known or index_bytes not in (expected, expected + self.n_sequences):
            raise _damaged(self.idx.path)
        self.dtype = np.dtype(MEGATRON_TYPES[code])
        self.n_documents, (self.n_tokens, rest) = ends - 1, divmod(n_bytes, self.dtype.itemsize)
        header = self.header
        if rest or (header and header.tokens != self.n_tokens):
            raise _damaged(self.bin.path)
        if header and header.documents != self.n_documents:
            raise _damaged(self.idx.path)
        if header and verify:
            for path, stored in ((self.bin.path, header.bin_hash), (self.idx.path, header.idx_hash)):
                if file_hash(path) != stored:
                    raise _damaged(path)

    def fingerprint(self) -> str:
        """Return the hashes of both files; for Megatron's shards, the size and the hash of the index."""
        if self.header is not None:
            return f"{self.header.bin_hash}/{self.header.idx_hash}"
        self.hashed = self.hashed or f"{self.n_tokens}/{file_hash(self.idx.path)}"
        return self.hashed

    def read_into(self, out: np.ndarray, places: list[int], starts: list[int], counts: list[int]) -> None:
        size, is_stored = self.dtype.itemsize, self.dtype.itemsize == out.itemsize
        stored = out if is_stored else np.empty(max(counts), dtype=self.dtype)
        raw = memoryview(stored).cast("B")  # type: ignore[arg-type]
        for place, start, count in zip(places, starts, counts, strict=True):
            at = place * size if is_stored else 0
            self.bin.read_into(raw[at : at + count * size], start * size)
            if not is_stored:
                # clip, so that an id beyond 32 bits does not wrap into the vocabulary
                out[place : place + count] = stored[:count].clip(max=(1 << 31) - 1) if size > 4 else stored[:count]

    def offsets(self) -> np.ndarray:
        with self.idx.path.open("rb") as file:
            file.seek(INDEX_HEADER.size + 4 * self.n_sequences)
            starts = np.fromfile(file, dtype="<i8", count=self.n_sequences) // self.dtype.itemsize
            ends = np.fromfile(file, dtype="<i8", count=self.n_documents + 1)
        if not ends[0] and ends[-1] == self.n_sequences and (np.diff(ends) >= 0).all():
            offsets = np.append(starts, self.n_tokens)[ends]
            if not offsets[0] and (np.diff(offsets) >= 0).all():
                return offsets
        raise _damaged(self.idx.path)

    def ends_between(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.n_documents != self.n_sequences:  # the index has offsets of sequences only
            return super().ends_between(starts, stops)
        if self.ends is None:
            self.ends = self.offsets()[::SPARSE].copy()
        first = (np.searchsorted(self.ends, starts, side="right") - 1) * SPARSE
        last = np.minimum(np.searchsorted(self.ends, stops, side="right") * SPARSE, self.n_documents)
        counts, at = last - first + 1, INDEX_HEADER.size + 4 * self.n_sequences
        read = self.idx.read
        raw = [read(at + 8 * a, 8 * n) for a, n in zip(first.tolist(), counts.tolist(), strict=True)]
        ends = np.frombuffer(b"".join(raw), dtype="<i8") // self.dtype.itemsize
        ends[np.cumsum(counts)[last == self.n_documents] - 1] = self.n_tokens  # not in the index
        row = np.repeat(np.arange(len(starts)), counts)
        kept = (ends > starts[row]) & (ends <= stops[row])
        kept[1:] &= ends[1:] != ends[:-1]  # without empty documents
        return ends[kept], np.bincount(row[kept], minlength=len(starts))


def _damaged(path: Path) -> DataError:
    return DataError(f"{path} is missing or damaged; prepare it again")


def _read_header(path: Path) -> Header | None:
    if not path.exists():
        return None
    try:
        header = Header(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise _damaged(path) from None
    if header.format_version != FORMAT_VERSION:
        raise DataError(f"{path}: format_version {header.format_version} is not {FORMAT_VERSION}; prepare it again")
    return header


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]
