"""The tokens of finished units to a corpus: exact duplicates left out, shards of about a gigabyte, corpus.json."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from corpus.config import DataError, Style
from corpus.left_out import LeftOut
from corpus.units import DOCUMENT, Job, file_name, read_unit, unit_folder
from data.shards import DTYPES, FORMAT_VERSION, SHARD_BYTES, Header, ShardWriter
from data.tokenizer import Tokenizer, load_tokenizer

COPY_TOKENS = 1 << 22
COMPARED_HASHES = 1 << 25  # at once, in about a gigabyte of memory


@dataclass(slots=True)
class Group:
    """The documents of one split and source in a unit: `path`.tokens, and `path`.documents."""

    path: Path
    split: str
    source: str
    token_hash: str
    dropped: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # documents that are duplicates


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


def merge_units(job: Job, n_units: int, before: dict[str, Any] | None, *, workers: int) -> dict[str, Any] | None:
    """Write the shards of all units; return what corpus.json shall hold of them, or None if some unit is not done.

    `before` is the corpus that the units are added to. What is done already is not done again.
    """
    data, partial = job.data, job.folder
    left_out = LeftOut(data.on_bad_record)
    groups: list[Group] = []
    for number in range(n_units):
        if (unit := read_unit(partial, number)) is None:
            return None
        left_out.merge(unit["left_out"])
        for name, token_hash in unit["groups"].items():
            split, source = name.split(".", 1)
            groups.append(Group(unit_folder(partial, number) / file_name(name), split, source, token_hash))
    groups.sort(key=lambda group: group.split != "valid")  # of equal documents the one that is held out stays
    splits = before["splits"] if before else {"train": {}, "valid": {}}
    stored = (stem for split in splits.values() for its in split.values() for stem in its["shards"])
    known = [Path(data.path) / f"{stem}.hashes" for stem in stored]
    places = [lambda path=path: np.fromfile(path, "<u8") for path in known]
    places += [lambda group=group: np.fromfile(f"{group.path}.documents", DOCUMENT)["hash"] for group in groups]
    for group, dropped in zip(groups, find_duplicates(places)[len(known) :], strict=True):
        group.dropped = dropped
        left_out.duplicates += len(dropped)
    tokenizer = load_tokenizer(partial / "tokenizer")
    tasks, masked = list(_shards(groups, splits)), data.style is not Style.text
    with ThreadPoolExecutor(workers) as pool:
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
        | {key: getattr(job.config, key) for key in ("add_bos", "add_eos")},
        "splits": {split: dict(sorted(sources.items())) for split, sources in splits.items()},
    }


def find_duplicates(arrays: Sequence[Callable[[], np.ndarray]]) -> list[np.ndarray]:
    """Return for each array of hashes the indices of those that an earlier place has, in it or in one before.

    Arrays are functions that read them, so that only a part of all hashes, by their remainder, is in memory.
    """
    limits = np.cumsum([0, *(len(read()) for read in arrays)])
    n_parts = 1 + int(limits[-1]) // COMPARED_HASHES
    found = [np.zeros(0, dtype=np.int64)]
    for part in range(n_parts if arrays else 0):
        parts = []
        for read, first in zip(arrays, limits[:-1], strict=True):
            its = read()
            inside = np.flatnonzero(its % np.uint64(n_parts) == part)
            parts.append((its[inside], inside + first))
        hashes, places = map(np.concatenate, zip(*parts, strict=True))
        order = np.argsort(hashes, kind="stable")
        again = hashes[order][1:] == hashes[order][:-1]
        found.append(places[order[1:][again]])
    dropped = np.sort(np.concatenate(found))
    parts = np.split(dropped, np.searchsorted(dropped, limits[1:-1]))
    return [part - first for part, first in zip(parts, limits[:-1], strict=False)]


def _shards(groups: list[Group], splits: dict[str, dict[str, Any]]) -> Iterator[tuple[str, list[Group]]]:
    """Yield (stem, groups) of each shard to be written: about a gigabyte of one split and source."""
    kept = [g for g in groups if len(g.dropped) < os.path.getsize(f"{g.path}.documents") // DOCUMENT.itemsize]
    of_one = attrgetter("split", "source")
    for (split, source), found in groupby(sorted(kept, key=of_one), of_one):
        its = list(found)
        number, size, shard = len(splits[split].get(source, {}).get("shards", ())), 0, []
        for group in its:
            shard.append(group)
            size += os.path.getsize(f"{group.path}.tokens")
            if size >= SHARD_BYTES or group is its[-1]:
                yield f"{split}/{file_name(source)}-{number:05d}", shard
                number, size, shard = number + 1, 0, []


def _write_shard(partial: Path, stem: str, groups: list[Group], tokenizer: Tokenizer, masked: bool) -> Header:
    header = partial / f"{stem}.json"
    if header.exists() and (stored := header.read_text(encoding="utf-8")):  # it is written last, at once
        return Header(**json.loads(stored))
    made_by = {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.fingerprint}
    writer = ShardWriter(partial / stem, **made_by, masked=masked)
    try:
        with open(partial / f"{stem}.hashes", "wb") as hashes:
            for group in groups:
                table = np.fromfile(f"{group.path}.documents", DOCUMENT)
                kept = np.ones(len(table), dtype=bool)
                kept[group.dropped] = False
                _copy(group, table, kept, writer)
                hashes.write(table["hash"][kept].tobytes())
        return writer.close()
    finally:
        writer.file.close()


def _copy(group: Group, table: np.ndarray, kept: np.ndarray, writer: ShardWriter) -> None:
    """Append the kept documents of a unit to a shard; raises `DataError` if its tokens are not what was written."""
    ends = np.cumsum(table["tokens"], dtype=np.int64)
    cuts = np.searchsorted(ends, np.arange(COPY_TOKENS, ends[-1], COPY_TOKENS))
    digest = xxhash.xxh3_128()
    with open(f"{group.path}.tokens", "rb") as file:
        for chunk in np.split(np.arange(len(table)), np.unique(cuts)):
            lengths, keep = table["tokens"][chunk].astype(np.int64), kept[chunk]
            ids = np.fromfile(file, DTYPES[writer.dtype], int(lengths.sum()))
            digest.update(ids.data)
            if keep.any():
                ids = ids if keep.all() else ids[np.repeat(keep, lengths)]
                text_bytes = int(table["text_bytes"][chunk][keep].sum(dtype=np.int64))
                writer.add(ids.astype(np.uint32), lengths[keep], text_bytes)
    if digest.hexdigest() != group.token_hash:  # as after a power failure
        shutil.rmtree(group.path.parent, ignore_errors=True)
        raise DataError(f"{group.path}.tokens is damaged and was removed; run the same command again")
