"""Tokens that other programs wrote, read as they are: Megatron-LM's `.bin/.idx` and InternLM's `.bin/.bin.meta`."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from corpus.config import DataError
from data.shards import LOSS_MASKED, Shard, file_hash


def token_files(folder: Path, name: str) -> dict[str, list["Shard | InternLMFile"]]:
    """Find a folder's files of tokens, by source: its sub-folders name them, as InternLM's type folders do."""
    paths = [folder] if folder.is_file() else sorted(folder.rglob("*.bin"))
    files: dict[str, list[Shard | InternLMFile]] = {}
    for path in paths:
        place = path.relative_to(folder)
        source = place.parts[0] if len(place.parts) > 1 else name
        files.setdefault(source, []).append(_open(path))
    return files


def refuse_overlap(train: dict[str, list[Any]], valid: dict[str, list[Any]], folder: str, valid_folder: str) -> None:
    """Raise `DataError` if a file is in both splits, under one name or two."""
    by_content: dict[str, Any] = {file.fingerprint(): file for files in train.values() for file in files}
    for file in (file for files in valid.values() for file in files):
        same = by_content.get(file.fingerprint())
        paths = [Path(f"{each.stem}.bin") for each in (same, file) if each is not None]
        if len(paths) == 2 and (paths[0].samefile(paths[1]) or file_hash(paths[0]) == file_hash(paths[1])):
            raise DataError(
                f"{paths[1]} of data.valid_input ({valid_folder}) would be trained on as {paths[0]} of data.input "
                f"({folder}); take it out of the one or the other"
            )


def _open(path: Path) -> "Shard | InternLMFile":
    if path.with_suffix(".idx").exists():
        return Shard(path.with_suffix(""))
    if Path(f"{path}.meta").exists():
        return InternLMFile(path)
    raise DataError(
        f"{path} has no index beside it: neither {path.stem}.idx (Megatron) nor {path.name}.meta (InternLM)"
    )


class InternLMFile:
    """InternLM's tokens: a JSON object a line, `{"tokens": [...]}`, and an array of (byte offset, tokens) a line.

    A negative token is one that is not to be learnt, and its value is the id's. Token 0, which InternLM never
    learns, is a token like any other.
    """

    masked = True
    header = None

    def __init__(self, path: Path) -> None:
        self.stem, self.path, self.meta = path.with_suffix(""), path, Path(f"{path}.meta")
        try:
            rows: Any = np.load(self.meta, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise DataError(f"{self.meta} is no array of offsets: {error}") from None
        if rows.ndim != 2 or rows.shape[1] < 2 or rows.dtype.kind not in "iu":
            raise DataError(f"{self.meta} holds {rows.dtype} {rows.shape}, not rows of byte offset and tokens")
        self.starts, counts = rows[:, 0].astype(np.int64), rows[:, -1].astype(np.int64)
        size = path.stat().st_size
        wrong = np.flatnonzero(
            (self.starts < 0) | (self.starts >= size) | (counts < 0) | (np.diff(self.starts, prepend=-1) <= 0)
        )
        if len(wrong):
            line = int(wrong[0])
            why = ""
            if self.starts[line] >= size:
                why = f"; {path.name} was cut short, or is not the one that {self.meta.name} was written for"
            elif self.starts[line] < 0 or (line and self.starts[line] <= self.starts[line - 1]):
                why = "; offsets that go back are those of a file over 2 GiB in 32 bits"
            raise DataError(
                f"{self.meta}: row {line} says that document {line} begins at byte {self.starts[line]} of {size} and "
                f"has {counts[line]} tokens{why}"
            )
        self.starts = np.append(self.starts, size)
        self.offsets = np.concatenate([[0], np.cumsum(counts)])
        self.n_documents, self.n_tokens = len(counts), int(self.offsets[-1])
        self.file: int | None = None
        self.hashed = ""

    def fingerprint(self) -> str:
        """Give the hash of the index, and the size of what it points into."""
        self.hashed = self.hashed or f"{int(self.starts[-1])}/{xxhash.xxh3_128_hexdigest(self.meta.read_bytes())}"
        return self.hashed

    def document(self, index: int) -> np.ndarray:
        """Give a document's ids, uint32, with the highest bit set where they are not to be learnt."""
        if self.file is None:
            self.file = os.open(self.path, os.O_RDONLY)
        start, end = int(self.starts[index]), int(self.starts[index + 1])
        try:
            ids = np.array(
                json.loads(os.pread(self.file, end - start, start).split(b"\n", 1)[0])["tokens"], dtype=np.int64
            )
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError(f"{self.path}: document {index}, at byte {start}, is no line of tokens: {error}") from None
        if len(ids) != self.offsets[index + 1] - self.offsets[index]:
            expected = self.offsets[index + 1] - self.offsets[index]
            raise DataError(
                f"{self.path}: document {index} has {len(ids)} tokens where {self.meta.name} says {expected}"
            )
        if ((ids <= -LOSS_MASKED) | (ids >= LOSS_MASKED)).any():
            raise DataError(f"{self.path}: document {index}, at byte {start}, holds an id over {LOSS_MASKED - 1}")
        return np.where(ids < 0, -ids | LOSS_MASKED, ids).astype(np.uint32)

    def read_parts(self, out: np.ndarray, places: list[int], starts: list[int], counts: list[int]) -> None:
        """Read `counts` tokens from `starts` on to `places` in `out`, int32 (n,)."""
        for place, start, count in zip(places, starts, counts, strict=True):
            out[place : place + count] = self.read(start, count)

    def read(self, start: int, n_tokens: int) -> np.ndarray:
        """Give `n_tokens` tokens from `start` on; int32, below 0 where they are not to be learnt."""
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        parts, have = [], -(start - int(self.offsets[first]))
        while have < n_tokens:
            parts.append(self.document(first))
            have += len(parts[-1])
            first += 1
        skipped = start - int(self.offsets[first - len(parts)])
        ids = np.concatenate([np.zeros(0, dtype=np.uint32), *parts])
        return ids[skipped : skipped + n_tokens].view(np.int32)

    def all_offsets(self) -> np.ndarray:
        return self.offsets

    def ends_between(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give the document ends in (start, stop] of several ranges, and how many each range has."""
        ends = np.unique(self.offsets)
        first, last = np.searchsorted(ends, starts, side="right"), np.searchsorted(ends, stops, side="right")
        return np.concatenate([ends[a:b] for a, b in zip(first, last, strict=True)]), last - first

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "file": None}

    def __del__(self) -> None:
        if self.__dict__.get("file") is not None:
            os.close(self.__dict__["file"])
