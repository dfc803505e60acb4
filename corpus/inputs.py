"""What a corpus is made of: files, addresses of object stores, datasets, each with its source."""

import glob
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpus.builtin import builtin_files
from corpus.compression import COMPRESSED, split_suffix
from corpus.config import CorpusConfig, DataError, Source, SplitBy, cause_of

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
MOST_SUFFIXES = 5


@dataclass(slots=True)
class Item:
    """A file or a dataset, with the split of all that is in it if that is decided."""

    path: str
    source: str
    split: str | None = None
    size: int = 0
    dataset: "Dataset | IterableDataset | None" = None


def source_name(name: str) -> str:
    """Return a name that is safe in a file's: `Wikipedia (en)` becomes `wikipedia_en`."""
    return re.sub(r"[^a-z0-9.+-]+", "_", name.lower()).strip("_.") or "unnamed"


def list_items(config: CorpusConfig, ignored: Counter[str] | None = None) -> list[Item]:
    """List what a corpus is made of, validation first; counts files of other formats in `ignored`, by suffix."""
    if config.source is Source.builtin:
        return [Item(path, "code", size=size) for path, size in builtin_files()]
    if config.source is Source.huggingface:
        return _load_dataset(config)
    name, ignored = source_name(config.name), Counter() if ignored is None else ignored
    held_out: list[Item] = []
    if config.valid_input is not None:
        held_out = list_files(config.valid_input, name, "data.valid_input", ignored)
    if config.input is not None:
        items = list_files(config.input, name, "data.input", ignored)
    else:
        items = [
            replace(item, source=source_name(key))
            for key, pattern in config.sources.items()
            for item in list_files(pattern, name, f"data.sources.{key}", ignored)
        ]
    train = "train" if held_out else None
    return [replace(i, split="valid") for i in held_out] + [replace(i, split=train) for i in items]


def check_inputs(config: CorpusConfig) -> None:
    """Raise `DataError` if a corpus is still to be made of files and there are none."""
    if config.source is Source.local and not (Path(config.path) / "corpus.json").exists():
        list_items(config)


def list_files(pattern: str, name: str, key: str, ignored: Counter[str]) -> list[Item]:
    """List the readable files of a path, folder, glob or fsspec address, without a folder's hidden ones.

    The first sub-folder below the folder, or below a glob's first wildcard, names the source; `name` is the others'.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(pattern)  # of a path on this machine: absolute
        if glob.has_magic(path):
            found = system.glob(path, detail=True)
            depth = next(depth for depth, part in enumerate(path.split("/")) if glob.has_magic(part))
        elif system.isdir(path):
            found, depth = system.find(path, detail=True), path.count("/") + 1
            found = {place: about for place, about in found.items() if "/." not in place.removeprefix(path)}
        else:
            found, depth = {path: system.info(path)}, path.count("/")
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{key} ({pattern}) cannot be listed: {error}") from None
    items = []
    for path, about in sorted(found.items()):
        # fsspec calls a symbolic link to a file, as in caches of Hugging Face's, `other`
        if about["type"] != "file" and not (about.get("islink") and Path(path).is_file()):
            continue
        if (kind := split_suffix(path)[0]) not in SUFFIXES:
            ignored[kind] += 1
            continue
        below = path.split("/")[depth:-1]
        place = system.unstrip_protocol(path) if "://" in pattern else path
        items.append(Item(place, source_name(below[0]) if below else name, size=about["size"] or 0))
    if not items:
        formats = f"{' '.join(SUFFIXES)}, plain or {' '.join(COMPRESSED)}"
        raise DataError(f"{key} ({pattern}) has no readable file; formats are {formats}")
    return items


def describe_ignored(ignored: Counter[str]) -> str:
    """Return a line about the files that are of no readable format, or an empty string."""
    by_number = sorted(ignored.items(), key=lambda each: (-each[1], each[0]))
    named = [f"{count} {suffix or 'without a suffix'}" for suffix, count in by_number[:MOST_SUFFIXES]]
    named += ["..."] * (len(by_number) > MOST_SUFFIXES)
    return f"files of other formats were ignored: {', '.join(named)}" if named else ""


def _load_dataset(config: CorpusConfig) -> list[Item]:
    """Load a dataset: whole, or in the two parts of `train_test_split(valid_fraction, seed=valid_seed)`."""
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
