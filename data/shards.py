"""Tokens on disk: a flat little-endian `.bin`, an `.idx` of its documents, a `.json` header.

The first two are Megatron-LM's (`IndexedDataset`, version 1), so that what is prepared here trains there, and
what was prepared there is read here, without the header. In a corpus of conversations the highest bit of a
token says that it is not to be learnt; nothing else is then stored than in any other.
"""

import json
import os
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from corpus.config import DataError

FORMAT_VERSION = 2
LOSS_MASKED = 1 << 31  # in tokens of type uint32
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
SHARD_BYTES = 1 << 30  # a shard that has reached this takes no further document

MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type, sequences, document ends with the 0 before them
# Megatron's types of tokens. It has no uint32; ids are below 2**31, where uint32 and int32 are the same bytes.
MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
SPARSE = 64  # documents between two offsets kept in memory


@dataclass(frozen=True, slots=True)
class Header:
    format_version: int
    dtype: str
    vocab_size: int
    tokenizer: str  # fingerprint
    masked: bool  # the highest bit of a token says that it is not to be learnt
    documents: int
    tokens: int
    text_bytes: int
    max_token: int
    bin_hash: str  # xxh3_128 of the files
    idx_hash: str


@dataclass(slots=True)
class Written:
    """How far a shard has been written: all that is needed to go on, or to cut it back to here."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    max_token: int = 0
    unfinished: int = 0  # tokens of a document whose end is still to come


class ShardWriter:
    """Appends documents to one shard; the header, written last, is what makes it one.

    `written` of an earlier writer goes on from there: what was written after it is cut off.
    """

    def __init__(
        self, stem: Path, *, vocab_size: int, tokenizer: str, masked: bool = False, written: Written | None = None
    ) -> None:
        self.stem, self.vocab_size, self.tokenizer, self.masked = stem, vocab_size, tokenizer, masked
        self.dtype = "uint16" if vocab_size <= 1 << 16 and not masked else "uint32"
        self.written = written or Written()
        self.hash = xxhash.xxh3_128()
        stem.parent.mkdir(parents=True, exist_ok=True)
        mode = "wb" if written is None else "r+b"
        self.bin = open(f"{stem}.bin", mode)  # noqa: SIM115
        self.lengths = open(f"{stem}.lengths", mode)  # noqa: SIM115
        if written is not None:
            self.bin.truncate((written.tokens + written.unfinished) * DTYPES[self.dtype].itemsize)
            self.lengths.truncate(written.documents * 4)
            self.lengths.seek(0, os.SEEK_END)
            while block := self.bin.read(1 << 20):
                self.hash.update(block)

    @property
    def full(self) -> bool:
        return not self.written.unfinished and self.written.tokens * DTYPES[self.dtype].itemsize >= SHARD_BYTES

    def add(self, ids: np.ndarray, text_bytes: int, *, ends: bool = True) -> None:
        """Append a document, or with `ends` false the beginning of one, whose text is `text_bytes` long."""
        self.add_many(ids, np.array([len(ids)]), text_bytes, ends=ends)

    def add_many(self, ids: np.ndarray, lengths: np.ndarray, text_bytes: int, *, ends: bool = True) -> None:
        """Append documents of uint32 ids that lie end to end; the last one goes on in the next call unless `ends`."""
        now = self.written
        tokens = ids & ~np.uint32(LOSS_MASKED) if self.masked else ids
        now.max_token = max(now.max_token, int(tokens.max(initial=0)))
        if now.max_token >= self.vocab_size:
            raise DataError(f"{self.stem}.bin: token {now.max_token} is outside the vocabulary ({self.vocab_size})")
        raw = ids.astype(DTYPES[self.dtype]).tobytes()
        self.bin.write(raw)
        self.hash.update(raw)
        lengths = lengths.astype("<i8")
        lengths[0] += now.unfinished
        now.unfinished = 0
        if not ends:
            now.unfinished, lengths = int(lengths[-1]), lengths[:-1]
        if lengths.max(initial=0) >= 1 << 31:
            raise DataError(f"{self.stem}.bin: a document of {lengths.max()} tokens; one has at most {(1 << 31) - 1}")
        self.lengths.write(lengths.astype("<i4").tobytes())
        now.documents += len(lengths)
        now.tokens += int(lengths.sum())
        now.text_bytes += text_bytes

    def sync(self) -> None:
        """Bring to the disk what was added."""
        for file in (self.bin, self.lengths):
            file.flush()
            os.fsync(file.fileno())

    def close_files(self) -> None:
        """Let go of the files, whether or not the shard is complete."""
        self.bin.close()
        self.lengths.close()

    def close(self) -> Header:
        """Write the index and the header, and give the header. `forget` may then be called."""
        assert not self.written.unfinished
        self.sync()
        self.close_files()
        index_hash = _write_index(self.stem, DTYPES[self.dtype])
        now = self.written
        header = Header(
            format_version=FORMAT_VERSION,
            dtype=self.dtype,
            vocab_size=self.vocab_size,
            tokenizer=self.tokenizer,
            masked=self.masked,
            documents=now.documents,
            tokens=now.tokens,
            text_bytes=now.text_bytes,
            max_token=now.max_token,
            bin_hash=self.hash.hexdigest(),
            idx_hash=index_hash,
        )
        Path(f"{self.stem}.json").write_text(json.dumps(asdict(header), indent=2) + "\n")
        return header

    def forget(self) -> None:
        """Remove what is only needed to go on with the shard."""
        Path(f"{self.stem}.lengths").unlink(missing_ok=True)


def _write_index(stem: Path, dtype: np.dtype) -> str:
    lengths = np.fromfile(f"{stem}.lengths", dtype="<i4")
    code = {"<u2": 8, "<u4": 4}[dtype.str]
    starts = (np.cumsum(lengths, dtype="<i8") - lengths) * dtype.itemsize
    parts = (
        INDEX_HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1),
        lengths.tobytes(),
        starts.astype("<i8").tobytes(),
        np.arange(len(lengths) + 1, dtype="<i8").tobytes(),
    )
    digest = xxhash.xxh3_128()
    with open(f"{stem}.idx", "wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


class Shard:
    """A shard opened for reading, ours or Megatron's; what can be known without reading it whole is checked.

    Nothing is mapped into memory: a file that is cut short while it is read is an error, not a dead process,
    and a process that has read a terabyte is no larger for it.
    """

    def __init__(self, stem: Path, *, verify: bool = False) -> None:
        self.stem = stem
        self.files: dict[str, int] = {}
        self.hashed = ""
        self.offsets: np.ndarray | None = None  # of every stride-th document
        self.stride = SPARSE
        has_header = Path(f"{stem}.json").exists()
        self.header = _read_header(Path(f"{stem}.json")) if has_header else None
        self._read_index_header()
        self.masked = self.header is not None and self.header.masked
        if self.header is not None:
            self.dtype = DTYPES[self.header.dtype]
            _check_size(Path(f"{stem}.bin"), self.header.tokens * self.dtype.itemsize, "its header")
            if self.header.documents != self.n_documents:
                raise DataError(
                    f"{stem}.idx has {self.n_documents} documents where the header says {self.header.documents}; "
                    "prepare the corpus again"
                )
        if verify and self.header is not None:
            for name, expected in (("bin", self.header.bin_hash), ("idx", self.header.idx_hash)):
                if file_hash(Path(f"{stem}.{name}")) != expected:
                    raise DataError(
                        f"{stem}.{name} is not what was written: its hash differs from the header's; "
                        "prepare the corpus again"
                    )
        if verify:
            self.all_offsets()

    def _read_index_header(self) -> None:
        path = Path(f"{self.stem}.idx")
        size = path.stat().st_size if path.exists() else -1
        if size < INDEX_HEADER.size:
            raise DataError(
                f"{path} {'is missing' if size < 0 else f'has {size} bytes'}, so it is no index of tokens; "
                "prepare it again"
            )
        with path.open("rb") as file:
            magic, version, code, sequences, ends = INDEX_HEADER.unpack(file.read(INDEX_HEADER.size))
        if magic != MAGIC or version != 1 or code not in MEGATRON_TYPES or not ends:
            raise DataError(
                f"{path} does not begin as an index of tokens does ({MAGIC!r}, version 1, a known type); "
                "prepare it again"
            )
        expected = INDEX_HEADER.size + sequences * 12 + ends * 8
        if size not in (expected, expected + sequences):  # the latter with Megatron's modes, a byte a sequence
            raise DataError(
                f"{path} has {size} bytes where its own header says {expected}: it was cut short or changed; "
                "prepare it again"
            )
        self.dtype = np.dtype(MEGATRON_TYPES[code])
        self.n_sequences, self.n_documents = sequences, ends - 1
        binary = Path(f"{self.stem}.bin")
        if not binary.exists():
            raise DataError(f"{binary} is missing; prepare it again")
        self.n_tokens = binary.stat().st_size // self.dtype.itemsize
        if self.n_tokens * self.dtype.itemsize != binary.stat().st_size:
            raise DataError(
                f"{binary} has {binary.stat().st_size} bytes, no multiple of a token's {self.dtype.itemsize}; "
                "prepare it again"
            )

    def fingerprint(self) -> str:
        """Give the hash of the tokens and documents; of another program's, of the index and the size."""
        if self.header is not None:
            return f"{self.header.bin_hash}/{self.header.idx_hash}"
        self.hashed = self.hashed or f"{self.n_tokens}/{file_hash(Path(f'{self.stem}.idx'))}"
        return self.hashed

    def read_parts(self, out: np.ndarray, places: list[int], starts: list[int], counts: list[int]) -> None:
        """Read `counts` tokens from `starts` on to `places` in `out`, int32 (n,), with the bits of what is stored."""
        size, file = self.dtype.itemsize, self._file("bin")
        narrow = np.empty(max(counts) if size != out.itemsize else 0, dtype=self.dtype)
        into: Any = narrow if len(narrow) else out
        raw = memoryview(into).cast("B")
        for place, start, count in zip(places, starts, counts, strict=True):
            at = 0 if len(narrow) else place * size
            n_bytes = os.preadv(file, (raw[at : at + count * size],), start * size)
            if n_bytes != count * size:
                raise DataError(
                    f"{self.stem}.bin was cut short while it was in use: {n_bytes // size} of {count} tokens could be "
                    f"read at token {start}"
                )
            if len(narrow):
                # an id of 64 bits that is none in 32 must not become one
                out[place : place + count] = narrow[:count].clip(max=(1 << 31) - 1) if size > 4 else narrow[:count]

    def read(self, start: int, n_tokens: int) -> np.ndarray:
        """Give `n_tokens` tokens from `start` on; int32, with the bits of what is stored in 32 of them."""
        out = np.empty(n_tokens, dtype=np.int32)
        if n_tokens:
            self.read_parts(out, [0], [start], [n_tokens])
        return out

    def document(self, index: int) -> np.ndarray:
        offsets = self.all_offsets()
        return self.read(int(offsets[index]), int(offsets[index + 1] - offsets[index]))

    def all_offsets(self) -> np.ndarray:
        """Give the documents' offsets in tokens, int64 (n_documents + 1,); raises `DataError` if they cannot be."""
        at = INDEX_HEADER.size + 4 * self.n_sequences
        with open(f"{self.stem}.idx", "rb") as file:
            file.seek(at)
            starts = np.fromfile(file, dtype="<i8", count=self.n_sequences) // self.dtype.itemsize
            ends = np.fromfile(file, dtype="<i8", count=self.n_documents + 1)
        if ends[0] or ends[-1] != self.n_sequences or (np.diff(ends) < 0).any():
            raise DataError(
                f"{self.stem}.idx: its documents do not divide its {self.n_sequences} sequences; prepare it again"
            )
        offsets = np.append(starts, self.n_tokens)[ends]
        backwards = np.flatnonzero(np.diff(offsets) < 0)
        if offsets[0] or len(backwards):
            document = int(backwards[0]) if len(backwards) else 0
            raise DataError(
                f"{self.stem}.idx: document {document} is from token {offsets[document]} to "
                f"{offsets[min(document + 1, len(offsets) - 1)]} of {self.n_tokens}; prepare it again"
            )
        return offsets

    def ends_between(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give the document ends in (start, stop] of several ranges, and how many each range has."""
        if self.offsets is None:
            offsets = self.all_offsets()
            if self.n_documents != self.n_sequences:
                self.stride = 1  # documents of several sequences: the index has no offsets of theirs
            self.offsets = offsets[:: self.stride].copy()
        first = np.searchsorted(self.offsets, starts, side="right")
        last = np.searchsorted(self.offsets, stops, side="right")
        if self.stride == 1:
            counts = last - first
            ends = np.concatenate([self.offsets[a:b] for a, b in zip(first.tolist(), last.tolist(), strict=True)])
        else:
            ends, counts = self._read_offsets((first - 1) * SPARSE, np.minimum(last * SPARSE, self.n_documents))
        kept = (ends > np.repeat(starts, counts)) & (ends <= np.repeat(stops, counts))
        kept[1:] &= ends[1:] != ends[:-1]  # an empty document ends where another does
        row = np.repeat(np.arange(len(starts)), counts)[kept]
        return ends[kept], np.bincount(row, minlength=len(starts))

    def _read_offsets(self, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give the offsets `first` to `last`, both included, of several ranges, and how many each has."""
        file, at = self._file("idx"), INDEX_HEADER.size + 4 * self.n_sequences
        counts = last - first + 1
        raw = b"".join(
            [os.pread(file, 8 * n, at + 8 * a) for a, n in zip(first.tolist(), counts.tolist(), strict=True)]
        )
        offsets = np.frombuffer(raw, dtype="<i8") // self.dtype.itemsize
        finals = np.cumsum(counts)[last == self.n_documents] - 1
        offsets[finals] = self.n_tokens  # where the index has something else
        return offsets, counts

    def _file(self, name: str) -> int:
        if name not in self.files:
            self.files[name] = os.open(f"{self.stem}.{name}", os.O_RDONLY)
        return self.files[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}}

    def __del__(self) -> None:
        for file in self.__dict__.get("files", {}).values():
            os.close(file)


def _read_header(path: Path) -> Header:
    try:
        fields: Any = json.loads(path.read_text())
        header = Header(**fields)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is not a shard's header: {error}; prepare the corpus again") from None
    if header.format_version != FORMAT_VERSION:
        raise DataError(
            f"{path}: format_version {header.format_version} is not {FORMAT_VERSION}; prepare the corpus again"
        )
    counts = (header.documents, header.tokens, header.vocab_size, header.max_token)
    if header.dtype not in DTYPES or not all(isinstance(n, int) and n >= 0 for n in counts):
        raise DataError(
            f"{path}: dtype ({header.dtype}) or counts {counts} are not a shard's; prepare the corpus again"
        )
    return header


def _check_size(path: Path, expected: int, whose: str) -> None:
    size = path.stat().st_size
    if size != expected:
        raise DataError(
            f"{path} has {size} bytes where {whose} says {expected}: it was cut short or changed; "
            "prepare the corpus again"
        )


def file_hash(path: Path) -> str:
    """Give the xxh3_128 of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
