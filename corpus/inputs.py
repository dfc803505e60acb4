"""What a corpus is made of: files, addresses of object stores, datasets, each with its source."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpus.builtin import builtin_files
from corpus.compression import COMPRESSED, split_suffix
from corpus.config import STRUCTURED, CorpusConfig, DataError, Source, SourceConfig, SplitBy, as_paths, cause_of
from data.local_files import distinct_files, files_below

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

MOST_KINDS = 5


@dataclass(slots=True)
class Item:
    """A file or a dataset, with the split of all that is in it if that is decided."""

    path: str
    source: str
    split: str | None = None
    size: int = 0  # bytes; of a dataset rows, if their number is known
    dataset: "Dataset | IterableDataset | None" = None
    config: CorpusConfig | None = None  # how it is read, if its source has settings of its own


def list_items(config: CorpusConfig, ignored: Counter[str] | None = None) -> list[Item]:
    """List what a corpus is made of, validation first; counts in `ignored` what is not read, by suffix."""
    if config.source is Source.builtin:
        return [Item(path, "code", size=size) for path, size in builtin_files()]
    if config.source is Source.huggingface:
        return _load_dataset(config)
    ignored, items = Counter() if ignored is None else ignored, []
    inputs: dict[str, SourceConfig] = {"": config, **config.source_configs()}
    for name, its in inputs.items():
        key = f"data.sources.{name}." if name else "data."
        own = replace(config, **{f.name: getattr(its, f.name) for f in fields(SourceConfig)}) if name else None
        held_out = list_files(its.valid_input, f"{key}valid_input", own or config, ignored)
        found = list_files(its.input, f"{key}input", own or config, ignored)
        split = "train" if held_out or config.valid_input else None
        found = [replace(item, split="valid") for item in held_out] + [replace(item, split=split) for item in found]
        items += [replace(item, source=name or item.source, config=own) for item in found]
    return sorted(items, key=lambda item: (item.split != "valid", item.path))


def check_inputs(config: CorpusConfig) -> None:
    """Raise `DataError` if a corpus is still to be made of files and there are none."""
    if config.source is Source.local and not (Path(config.path) / "corpus.json").exists():
        list_items(config)


def list_files(paths: Any, key: str, config: CorpusConfig, ignored: Counter[str]) -> list[Item]:
    """List the readable files of paths, folders, globs and fsspec addresses, without folders' hidden ones.

    The first sub-folder below a folder, or below a glob's first wildcard, names the source; `data.name` is the others'.
    """
    suffixes = (*STRUCTURED, *config.text_suffixes)
    items: dict[str, Item] = {}
    for path in as_paths(paths):
        found = {item.path: item for item in _matching(path, key, config.name, ignored)}
        for place in [place for place in found if split_suffix(place)[0] not in suffixes]:
            ignored[split_suffix(found.pop(place).path)[0] or "without a suffix"] += 1
        if not found:
            formats = f"{' '.join(suffixes)}, plain or {' '.join(COMPRESSED)}"
            raise DataError(f"{key} ({path}) has no readable file; formats are {formats} (see data.text_suffixes)")
        items |= found
    return [items[path] for path in distinct_files(items)]


def _matching(pattern: str, key: str, name: str, ignored: Counter[str]) -> Iterator[Item]:
    """Yield all files that a path, a glob or an address stands for."""
    import fsspec
    from fsspec.utils import glob_translate

    sizes: dict[str, int]
    try:
        system, path = fsspec.core.url_to_fs(pattern)  # of a path on this machine: absolute
        if is_local := "file" in system.protocol:  # of whatever spelling
            path = str(Path(path).resolve() if os.path.isdir(path) else Path(path).parent.resolve() / Path(path).name)
        base = path  # the part before a glob's first wildcard; in a name that exists there is none
        while glob.has_magic(base) and not system.exists(base):
            base = base.rpartition("/")[0]
        rest = path[len(base) :].lstrip("/")
        if not rest and not system.isdir(path):
            sizes, base = {path: system.info(path)["size"]}, path.rpartition("/")[0]
        else:
            if is_local:
                depth, matches = rest.count("/") + 1, re.compile(glob_translate(rest or "**"))
                found = files_below(base, ignored, None if "**" in rest or not rest else depth)
                sizes = {p: os.path.getsize(p) for p in found if matches.match(p[len(base) :].lstrip("/"))}
            else:
                listed: Any = system.glob(path, detail=True) if rest else system.find(path, detail=True)
                sizes = {place: about["size"] or 0 for place, about in listed.items() if about["type"] == "file"}
            if "/." not in f"/{rest}":
                sizes = {place: size for place, size in sizes.items() if "/." not in place[len(base) :]}
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{key} ({pattern}) cannot be listed: {error}") from None
    if ".arrow" in (endings := {os.path.splitext(place)[1] for place in sizes}) and ".json" in endings:
        raise DataError(f"{key} ({pattern}) was made by save_to_disk; read it with data=huggingface data.dataset=...")
    for place, size in sorted(sizes.items()):
        folder, slash, _ = place[len(base) :].lstrip("/").partition("/")
        yield Item(place if is_local else system.unstrip_protocol(place), folder if slash else name, size=size)


def describe_ignored(ignored: Counter[str]) -> str:
    """Return a line about what was not read, or an empty string."""
    by_number = sorted(ignored.items(), key=lambda each: (each[0][0] == ".", -each[1], each[0]))
    named = ", ".join(f"{count} {kind}" for kind, count in by_number[:MOST_KINDS])
    return f"not read: {named}{', ...' * (len(by_number) > MOST_KINDS)}" if named else ""


def _load_dataset(config: CorpusConfig) -> list[Item]:
    """Load a dataset: whole, with its own validation split, or in two parts as `train_test_split` makes them."""
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
    return [Item(paths[part], config.name, part, getattr(its, "num_rows", 0), its) for part, its in parts.items()]


def _load_split(config: CorpusConfig, split: str) -> Any:
    """Load a split of a dataset by its name on the hub, of a folder of files, or of what `save_to_disk` wrote."""
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
