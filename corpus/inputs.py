"""What there is to read: files, addresses of object stores, datasets, each with its source."""

import glob
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from corpus.compression import PACKED, kind_of, open_raw
from corpus.config import DataError, OnBadRecord, Source, SplitBy, cause_of
from data.config import DataConfig

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
PLACES_TOLD = 10
SUFFIXES_TOLD = 5


@dataclass(slots=True)
class BadRecords:
    """What could not be read: the first stops everything, or all are counted and ten are told."""

    policy: OnBadRecord
    count: int = 0
    empty: int = 0
    places: list[str] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)  # files that are of no known kind, by suffix

    def add(self, place: str, reason: str) -> None:
        if self.policy is OnBadRecord.error:
            raise DataError(f"{place}: {reason}; mend it, or leave such records out by data.on_bad_record=skip")
        self.count += 1
        if len(self.places) < PLACES_TOLD:
            self.places.append(f"{place}: {reason}")

    def clear(self) -> None:
        self.count, self.empty, self.places = 0, 0, []

    def as_json(self) -> dict[str, Any]:
        return {"count": self.count, "empty": self.empty, "places": self.places}

    def merge(self, other: "BadRecords") -> None:
        self.count += other.count
        self.empty += other.empty
        self.places += other.places[: PLACES_TOLD - len(self.places)]

    def passed_over_line(self) -> str:
        """Say which files are of no known kind; nothing if there are none."""
        if not self.passed_over:
            return ""
        by_number = sorted(self.passed_over.items(), key=lambda each: (-each[1], each[0]))
        told = [f"{count} {suffix or 'without a suffix'}" for suffix, count in by_number[:SUFFIXES_TOLD]]
        more = ["..."] if len(by_number) > SUFFIXES_TOLD else []
        n = self.passed_over.total()
        return f"{n} file{'s were' if n > 1 else ' was'} passed over: {', '.join([*told, *more])}"


@dataclass(slots=True)
class Item:
    """What is read from its beginning to its end: a file, or a dataset."""

    path: str
    source: str
    split: str | None = None
    size: int = 0
    dataset: Any = None


def source_name(name: str) -> str:
    """Make a name that is safe as a file's: `Wikipedia (en)` becomes `wikipedia_en`."""
    return re.sub(r"[^a-z0-9.+-]+", "_", name.lower()).strip("_.") or "unnamed"


def items(config: DataConfig, bad: BadRecords, *, known: Container[str] = ()) -> list[Item]:
    """List what a corpus is made of, in order; what is held out whole comes first.

    Of files with the same bytes one is kept: one that is `known`, which is in the corpus already, or the first.
    """
    match config.source:
        case Source.builtin:
            return [Item("the standard library", "code")]
        case Source.huggingface:
            return _dataset_items(config)
        case _:
            found = [*_local_items(config, bad.passed_over)]
            copies = _copies(sorted(found, key=lambda item: item.path not in known), bad)
            return [item for item in found if id(item) not in copies]


def _local_items(config: DataConfig, passed_over: Counter[str]) -> Iterator[Item]:
    def files(pattern: str, key: str) -> list[Item]:
        return local_files(pattern, source_name(config.name), key, passed_over)

    if config.valid_input is not None:
        yield from (replace(item, split="valid") for item in files(config.valid_input, "data.valid_input"))
    if config.input is not None:
        found = files(config.input, "data.input")
    else:
        parts = config.sources.items()
        found = [replace(i, source=source_name(k)) for k, v in parts for i in files(v, f"data.sources.{k}")]
    yield from (replace(item, split="train") for item in found) if config.valid_input else found


def refuse_no_files(config: DataConfig) -> None:
    """Raise `DataError` if a corpus is still to be made, of files, and there are none."""
    if config.source is Source.local and not (Path(config.path) / "corpus.json").exists():
        for _ in _local_items(config, Counter()):
            pass


def local_files(pattern: str, name: str, key: str, passed_over: Counter[str]) -> list[Item]:
    """List the readable files of a path, a folder, a glob or an fsspec address; a sub-folder names the source.

    Counts the others in `passed_over`, but for those of a folder that are hidden.
    """
    if "://" in pattern:
        root, paths = _remote_files(pattern, key)
    else:
        base = Path(pattern).absolute()  # so that files are known again from another working directory
        in_folder = (path for path in base.rglob("*") if not _is_hidden(str(path.relative_to(base))))
        found = in_folder if base.is_dir() else map(Path, glob.glob(str(base), recursive=True))
        paths = {str(path): path.stat().st_size for path in found if path.is_file()}
        # of a glob, sources are the folders under what comes before its first wildcard
        root = str(base if base.is_dir() else Path(*_before_wildcard(base.parts)))
    files = []
    for path in sorted(paths):
        if kind_of(path) not in SUFFIXES:
            passed_over[kind_of(path)] += 1
            continue
        folders = Path(path.removeprefix(root).lstrip("/")).parts[:-1] if path.startswith(root) else ()
        files.append(Item(path, source_name(folders[0]) if folders else name, size=paths[path]))
    if not files:
        raise DataError(
            f"{key} ({pattern}) names no file that can be read: it takes {', '.join(SUFFIXES)}, "
            f"each plain or {', '.join(PACKED)}"
        )
    return files


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in Path(path).parts)


def _before_wildcard(parts: tuple[str, ...]) -> Iterator[str]:
    for part in parts[:-1]:
        if glob.has_magic(part):
            return
        yield part


def _remote_files(address: str, key: str) -> tuple[str, dict[str, int]]:
    """List the files of an address such as s3://bucket/texts/*.jsonl.zst, with their sizes."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(address)
        if glob.has_magic(path):
            found = system.glob(path, detail=True)
            root = str(Path(*_before_wildcard(Path(path).parts)))
        else:
            in_folder = system.find(path, detail=True) if system.isdir(path) else {}
            found = {k: v for k, v in in_folder.items() if not _is_hidden(k.removeprefix(path).lstrip("/"))}
            found = found if system.isdir(path) else {path: system.info(path)}
            root = path if system.isdir(path) else path.rpartition("/")[0]
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{key} ({address}) cannot be listed: {error}") from None
    sizes = {name: int(info.get("size") or 0) for name, info in found.items() if info["type"] == "file"}
    return system.unstrip_protocol(root), {system.unstrip_protocol(name): size for name, size in sizes.items()}


def _copies(found: list[Item], bad: BadRecords) -> set[int]:
    """Give the ids of items that have the bytes of an earlier one; few files are read for it."""
    groups = [[item for item in found if item.size]]
    for key in (_size, _head, _digest):
        groups = [alike for group in groups for alike in _alike(group, key)]
    for first, *others in groups:
        for item in others:
            if item.path != first.path:
                bad.add(item.path, f"has the same bytes as {first.path}")
            else:
                bad.add(item.path, "is in data.valid_input as well" if first.split == "valid" else "is named twice")
    return {id(item) for _, *others in groups for item in others}


def _alike(found: list[Item], key: Callable[[Item], Any]) -> list[list[Item]]:
    """Give the items that share a key with others."""
    groups: dict[Any, list[Item]] = {}
    for item in found:
        groups.setdefault(key(item), []).append(item)
    return [group for group in groups.values() if len(group) > 1]


def _size(item: Item) -> int:
    return item.size


def _head(item: Item) -> bytes:
    with open_raw(item.path) as file:
        return file.read(1 << 12)


def _digest(item: Item) -> bytes:
    digest = xxhash.xxh3_128()
    with open_raw(item.path) as file:
        while raw := file.read(1 << 20):
            digest.update(raw)
    return digest.digest()


def _dataset_items(config: DataConfig) -> list[Item]:
    """Load a dataset: whole, or by rows as `train_test_split(valid_fraction, seed=valid_seed)` splits it."""
    import datasets
    from datasets.exceptions import DatasetsError

    name, source = str(config.dataset), source_name(config.name)
    try:
        dataset: Any = datasets.load_dataset(  # type: ignore[call-overload]
            name, config.dataset_config, split=config.dataset_split, streaming=config.streaming
        )
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(f"data.dataset ({name}) cannot be loaded: {cause_of(error)}") from None
    if config.split_by is SplitBy.hash or not config.valid_fraction or len(dataset) < 2:
        return [Item(name, source, dataset=dataset)]
    split = dataset.train_test_split(test_size=config.valid_fraction, seed=config.valid_seed)
    parts = (("valid", split["test"]), ("train", split["train"]))
    return [Item(f"{name}/{part}", source, part, dataset=rows) for part, rows in parts]
