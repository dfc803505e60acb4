"""The inputs of a corpus: local files, files in object stores, datasets."""

import os
from collections import Counter
from dataclasses import dataclass, fields, replace
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpus.builtin import builtin_files
from corpus.compression import OPENERS, split_suffix
from corpus.config import STRUCTURED, CorpusConfig, DataError, Source, SourceConfig, SplitBy, as_paths, cause_of
from data.local_files import distinct_files, matching_files

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


@dataclass(slots=True)
class Item:
    """A file or a dataset."""

    path: str
    source: str
    split: str | None = None  # of all its documents; None: by document
    size: int = 0  # bytes, or rows of a dataset if known
    dataset: "Dataset | IterableDataset | None" = None
    config: CorpusConfig | None = None  # overrides the corpus' configuration


def list_items(config: CorpusConfig, ignored: Counter[str] | None = None) -> list[Item]:
    """List the inputs of a corpus, validation first; count ignored files by suffix in `ignored`."""
    if config.source is Source.builtin:
        return [Item(path, "code", size=size) for path, size in builtin_files()]
    if config.source is Source.huggingface:
        return _load_dataset(config)
    ignored, items = Counter() if ignored is None else ignored, []
    inputs: dict[str, SourceConfig] = {"": config, **config.source_configs()}
    for name, source in inputs.items():
        key = f"data.sources.{name}." if name else "data."
        override = replace(config, **{f.name: getattr(source, f.name) for f in fields(SourceConfig)}) if name else None
        held_out = list_files(source.valid_input, f"{key}valid_input", override or config, ignored)
        found = list_files(source.input, f"{key}input", override or config, ignored)
        split = "train" if held_out or config.valid_input else None
        found = [replace(item, split="valid") for item in held_out] + [replace(item, split=split) for item in found]
        items += [replace(item, source=name or item.source, config=override) for item in found]
    return sorted(items, key=lambda item: (item.split != "valid", item.path))


def list_files(paths: Any, key: str, config: CorpusConfig, ignored: Counter[str]) -> list[Item]:
    """List the readable files of paths, folders, globs and fsspec URLs, without hidden ones.

    The first sub-folder below a folder, or below a glob's first wildcard, names the source; the default is `data.name`.
    """
    suffixes = (*STRUCTURED, *config.text_suffixes)
    items: dict[str, Item] = {}
    for path in as_paths(paths):
        try:
            is_remote = "://" in path.removeprefix("file://")
            base, sizes = _remote_files(path) if is_remote else _local_files(path, ignored)
        except (OSError, ValueError, ImportError) as error:
            raise DataError(f"{key} ({path}) cannot be listed: {error}") from None
        if {".arrow", ".json"} <= {os.path.splitext(place)[1] for place in sizes}:
            remedy = "read it with data=huggingface data.dataset=..."
            raise DataError(f"{key} ({path}) was made by save_to_disk; {remedy}")
        readable = {place: size for place, size in sizes.items() if split_suffix(place)[0] in suffixes}
        ignored.update(split_suffix(place)[0] or "without a suffix" for place in sizes.keys() - readable.keys())
        if not readable:
            formats = f"{' '.join(suffixes)}, plain or {' '.join(OPENERS)}"
            raise DataError(f"{key} ({path}) has no readable file; formats are {formats} (see data.text_suffixes)")
        for place, size in readable.items():
            folder, slash, _ = place[len(base) :].lstrip("/").partition("/")
            items[place] = Item(place, folder if slash else config.name, size=size)
    return [items[path] for path in distinct_files(items)]


def _local_files(pattern: str, ignored: Counter[str]) -> tuple[str, dict[str, int]]:
    base, found = matching_files(os.path.expanduser(pattern.removeprefix("file://")), ignored)
    return base, {path: os.path.getsize(path) for path in found}


def _remote_files(pattern: str) -> tuple[str, dict[str, int]]:
    import fsspec

    system, path = fsspec.core.url_to_fs(pattern)
    base, is_pattern = path, has_magic(path) and not system.exists(path)
    listed: Any = system.glob(path, detail=True) if is_pattern else system.find(path, detail=True)
    while has_magic(base) or base in listed:
        base = os.path.dirname(base)
    sizes = {
        system.unstrip_protocol(place): about["size"] or 0
        for place, about in listed.items()
        if about["type"] == "file" and "/." not in place[len(base) :]
    }
    return system.unstrip_protocol(base), sizes


def _load_dataset(config: CorpusConfig) -> list[Item]:
    """Load a dataset whole, with its validation split, or split by `train_test_split`."""
    name = str(config.dataset)
    dataset = _load_split(config, config.dataset_split)
    if config.dataset_valid_split is not None:
        parts = {"valid": _load_split(config, config.dataset_valid_split), "train": dataset}
    elif config.split_by is SplitBy.hash or not config.valid_fraction or len(dataset) < 2:
        parts = {None: dataset}
    else:
        split = dataset.train_test_split(test_size=config.valid_fraction, seed=config.valid_seed)
        parts = {"valid": split["test"], "train": split["train"]}
    paths = {part: f"{name}/{part}" if part else name for part in parts}
    return [Item(paths[part], config.name, part, getattr(rows, "num_rows", 0), rows) for part, rows in parts.items()]


def _load_split(config: CorpusConfig, split: str) -> Any:
    """Load a split of a dataset on the hub, in a folder of files, or written by `save_to_disk`."""
    import datasets
    from datasets.exceptions import DatasetsError

    name = str(config.dataset)
    try:
        if not any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            options: Any = {"split": split, "streaming": config.streaming}
            return datasets.load_dataset(name, config.dataset_config, **options)
        found = datasets.load_from_disk(name)
        found = found if isinstance(found, datasets.DatasetDict) else {str(found.split or "train"): found}
        if split not in found:
            raise ValueError(f"it has no split {split}, but {', '.join(map(str, found))}")
        return found[split].to_iterable_dataset() if config.streaming else found[split]
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(f"data.dataset ({name}) cannot be loaded: {cause_of(error)}") from None
