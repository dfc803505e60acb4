"""Token files of other programs: Megatron-LM's `.bin/.idx` and InternLM's `.bin/.bin.meta`."""

import json
import os
from pathlib import Path

import numpy as np
import xxhash

from corpus.config import DataError
from data.local_files import token_paths
from data.shards import LOSS_MASKED, FileReader, Shard, TokenFile, file_hash


def token_files(folders: list[str], name: str) -> dict[str, list[TokenFile]]:
    """Return the token files in folders by source, which is the sub-folder, as InternLM's type folders."""
    files: dict[str, list[TokenFile]] = {}
    for folder in map(os.path.abspath, folders):
        for path in token_paths(folder):
            place = path.relative_to(folder)
            files.setdefault(place.parts[0] if len(place.parts) > 1 else name, []).append(_open(path))
    return files


def check_no_overlap(train: dict[str, list[TokenFile]], valid: dict[str, list[TokenFile]]) -> None:
    """Raise `DataError` if a file is in both splits, even as a copy."""
    by_content = {file.fingerprint(): file for files in train.values() for file in files}
    for file in (file for files in valid.values() for file in files):
        if same := by_content.get(file.fingerprint()):
            path, other = Path(f"{file.stem}.bin"), Path(f"{same.stem}.bin")
            if path.samefile(other) or file_hash(path) == file_hash(other):
                raise DataError(f"{path} of data.valid_input is in data.input too, as {other}; remove one of them")


def _open(path: Path) -> TokenFile:
    if path.with_suffix(".idx").exists():
        return Shard(path.with_suffix(""))
    if Path(f"{path}.meta").exists():
        return InternLMFile(path)
    raise DataError(f"{path} has no index: neither {path.stem}.idx (Megatron) nor {path.name}.meta (InternLM)")


class InternLMFile(TokenFile):
    """InternLM's format: one JSON object per line, `{"tokens": [...]}`, and an array of (byte offset, tokens) rows.

    A negative token is not a target; its id is the absolute value. Unlike in InternLM, token 0 can be a target.
    """

    masked = True

    def __init__(self, path: Path) -> None:
        self.stem, self.bin, self.meta = path.with_suffix(""), FileReader(path), Path(f"{path}.meta")
        try:
            rows = np.load(self.meta, allow_pickle=False)
            starts, counts = rows[:, 0].astype(np.int64), rows[:, -1].astype(np.int64)
        except (ValueError, EOFError, IndexError) as error:
            raise DataError(f"{self.meta} is not an array of byte offsets and lengths: {error}") from None
        self.starts = np.append(starts, path.stat().st_size)
        if (np.diff(self.starts, prepend=-1) <= 0).any() or (counts < 0).any():
            # InternLM's tools write 32-bit offsets, which overflow in files over 2 GiB
            raise DataError(f"{self.meta} has offsets that are not in {path.name} or not in order; write it again")
        self.limits = np.concatenate([[0], np.cumsum(counts)])
        self.n_documents, self.n_tokens = len(counts), int(self.limits[-1])

    def fingerprint(self) -> str:
        """Return the size of the file and the hash of its index."""
        return f"{int(self.starts[-1])}/{xxhash.xxh3_128_hexdigest(self.meta.read_bytes())}"

    def offsets(self) -> np.ndarray:
        return self.limits

    def document(self, index: int) -> np.ndarray:
        start, end = self.starts[index : index + 2].tolist()
        try:
            ids = np.array(json.loads(self.bin.read(start, end - start).split(b"\n", 1)[0])["tokens"], dtype=np.int64)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError(f"{self.bin.path}: document {index} is not a line of tokens: {error}") from None
        if len(ids) != self.limits[index + 1] - self.limits[index]:
            raise DataError(f"{self.bin.path}: document {index} has {len(ids)} tokens, unlike in {self.meta.name}")
        if (np.abs(ids) >= LOSS_MASKED).any():
            raise DataError(f"{self.bin.path}: document {index} has an id over {LOSS_MASKED - 1}")
        return np.where(ids < 0, -ids | LOSS_MASKED, ids).astype(np.uint32).view(np.int32)

    def read_into(self, out: np.ndarray, places: list[int], starts: list[int], counts: list[int]) -> None:
        for place, start, count in zip(places, starts, counts, strict=True):
            first = int(np.searchsorted(self.limits, start, side="right")) - 1
            last = int(np.searchsorted(self.limits, start + count, side="left"))
            ids = np.concatenate([self.document(index) for index in range(first, last)])
            out[place : place + count] = ids[start - int(self.limits[first]) :][:count]
