"""Merge finished units into a corpus: drop exact duplicates, write shards of about 1 GB and corpus.json."""

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from corpus.config import DataError, Style
from corpus.documents import LeftOut
from corpus.units import DOCUMENT, Job, file_name, read_unit, unit_folder
from data.shards import FORMAT_VERSION, SHARD_BYTES, Header, ShardWriter
from data.tokenizer import Tokenizer, load_tokenizer

COPY_TOKENS = 1 << 22  # per read
COMPARED_PARTS = 16  # hashes are deduplicated in so many parts, to bound memory


@dataclass(slots=True)
class Group:
    """The documents of one split and source in a unit: `path`.tokens and `path`.documents."""

    path: Path
    split: str
    source: str
    kept: np.ndarray = field(init=False)  # bool: False for duplicates

    def documents(self) -> np.ndarray:
        return np.fromfile(f"{self.path}.documents", DOCUMENT)


def merge_units(job: Job, n_units: int, before: dict[str, Any] | None) -> dict[str, Any] | None:
    """Write the shards of all units; return the contents of corpus.json, or None if a unit is not done.

    `before` is the corpus.json that the units are added to. Shards that exist are not written again.
    """
    data, partial = job.config.data, job.folder
    left_out = LeftOut(data.on_bad_record)
    groups: list[Group] = []
    for number in range(n_units):
        if (unit := read_unit(partial, number)) is None:
            return None
        left_out.merge(unit["left_out"])
        for name in unit["groups"]:
            groups.append(Group(unit_folder(partial, number) / file_name(name), *name.split(".", 1)))
    groups.sort(key=lambda group: group.split != "valid")  # of duplicates, keep the one in validation
    splits = before["splits"] if before else {"train": {}, "valid": {}}
    stems = [stem for split in splits.values() for source in split.values() for stem in source["shards"]]
    hashes = [np.fromfile(Path(data.path) / f"{stem}.hashes", "<u8") for stem in stems]
    hashes += [group.documents()["hash"].copy() for group in groups]
    for group, kept in zip(groups, are_first(hashes)[len(stems) :], strict=True):
        group.kept = kept
        left_out.duplicates += int((~kept).sum())
    tokenizer = load_tokenizer(partial / "tokenizer")
    tasks, masked = list(_shards(groups, splits)), data.style is not Style.text
    with ThreadPoolExecutor(job.workers) as pool:
        headers = list(pool.map(lambda task: _write_shard(partial, task[0], task[1], tokenizer, masked), tasks))
    for (stem, [group, *_]), header in zip(tasks, headers, strict=True):
        none = {"documents": 0, "tokens": 0, "text_bytes": 0, "shards": []}
        counts = splits[group.split].setdefault(group.source, none)
        for key in ("documents", "tokens", "text_bytes"):
            counts[key] += getattr(header, key)
        counts["shards"].append(stem)
    if not splits["train"]:
        shutil.rmtree(partial)
        raise DataError(f"data.source ({data.source.value}) has no training document{left_out.first()}")
    if before:
        left_out.merge(before["left_out"])
    return {
        "format_version": FORMAT_VERSION,
        "units": n_units + (before["units"] if before else 0),
        "left_out": left_out.as_json(),
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
        | {key: getattr(job.config.tokenizer, key) for key in ("add_bos", "add_eos")},
        "splits": {split: dict(sorted(sources.items())) for split, sources in splits.items()},
    }


def are_first(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Return bool arrays that are True at the first occurrence of each hash (uint64) in all arrays."""
    hashes = np.concatenate([np.zeros(0, dtype="<u8"), *arrays])
    first = np.zeros(len(hashes), dtype=bool)
    lowest_bytes = hashes.view(np.uint8)[::8]
    for part in range(COMPARED_PARTS):
        places = np.flatnonzero(lowest_bytes % COMPARED_PARTS == part)
        first[places[np.unique(hashes[places], return_index=True)[1]]] = True
    return np.split(first, np.cumsum([len(array) for array in arrays]))[:-1]


def _shards(groups: list[Group], splits: dict[str, dict[str, Any]]) -> Iterator[tuple[str, list[Group]]]:
    """Yield (stem, groups) of each shard to write: about 1 GB of one split and source."""
    by = attrgetter("split", "source")
    for (split, source), found in groupby(sorted((g for g in groups if g.kept.any()), key=by), by):
        same = list(found)
        number, size, shard = len(splits[split].get(source, {}).get("shards", ())), 0, []
        for group in same:
            shard.append(group)
            size += os.path.getsize(f"{group.path}.tokens")
            if size >= SHARD_BYTES or group is same[-1]:
                yield f"{split}/{file_name(source)}-{number:05d}", shard
                number, size, shard = number + 1, 0, []


def _write_shard(partial: Path, stem: str, groups: list[Group], tokenizer: Tokenizer, masked: bool) -> Header:
    header = partial / f"{stem}.json"
    if header.exists() and (stored := header.read_text(encoding="utf-8")):  # written last
        return Header(**json.loads(stored))
    made_by = {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.fingerprint}
    writer = ShardWriter(partial / stem, **made_by, masked=masked)
    try:
        with open(partial / f"{stem}.hashes", "wb") as hashes:
            for group in groups:
                table = group.documents()
                table[group.kept]["hash"].tofile(hashes)
                _copy(group, table, writer)
        return writer.close()
    finally:
        writer.file.close()


def _copy(group: Group, table: np.ndarray, writer: ShardWriter) -> None:
    """Append the kept documents of a group to a shard."""
    ends = np.cumsum(table["tokens"], dtype=np.int64)
    cuts = np.unique(np.searchsorted(ends, np.arange(COPY_TOKENS, ends[-1], COPY_TOKENS)))
    with open(f"{group.path}.tokens", "rb") as file:
        for part, kept in zip(np.split(table, cuts), np.split(group.kept, cuts), strict=True):
            n_tokens = int(part["tokens"].sum())
            ids = np.fromfile(file, writer.dtype, n_tokens)
            if len(ids) < n_tokens:  # after a power failure
                shutil.rmtree(group.path.parent, ignore_errors=True)
                raise DataError(f"{file.name} is damaged and was removed; run the same command again")
            ids = ids[np.repeat(kept, part["tokens"])].astype(np.uint32)
            writer.add(ids, part["tokens"][kept], int(part["text_bytes"][kept].sum()))
