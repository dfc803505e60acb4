"""Documents from files and datasets, one at a time, with the place each came from."""

import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import zstandard

from data.config import DataConfig, DataError, OnBadRecord

SUFFIXES = (".txt", ".json", ".jsonl")
COMPRESSED = (".gz", ".zst")
PLACES_TOLD = 10


@dataclass(slots=True)
class Document:
    text: str
    source: str
    place: str  # file and line, for messages
    key: str | None = None  # what decides the split (None: the text)
    split: str | None = None  # where the dataset itself decides


@dataclass(slots=True)
class BadRecords:
    """What could not be read: the first stops everything, or all are counted and ten are told."""

    policy: OnBadRecord
    count: int = 0
    empty: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str, reason: str) -> None:
        if self.policy is OnBadRecord.error:
            raise DataError(f"{place}: {reason}; mend it, or leave such records out by data.on_bad_record=skip")
        self.count += 1
        if len(self.places) < PLACES_TOLD:
            self.places.append(f"{place}: {reason}")


def source_name(name: str) -> str:
    """Make a name that is safe as a file's: `Wikipedia (en)` becomes `wikipedia_en`."""
    return re.sub(r"[^a-z0-9.+-]+", "_", name.lower()).strip("_.") or "unnamed"


def local_files(pattern: str) -> list[Path]:
    """List the readable files of a path, a folder or a glob, in order."""
    root = Path(pattern)
    found = root.rglob("*") if root.is_dir() else map(Path, glob.glob(pattern, recursive=True))
    files = sorted(path for path in found if path.is_file() and _kind(path) in SUFFIXES)
    if not files:
        raise DataError(
            f"data.input ({pattern}) names no file that can be read: it takes "
            f"{', '.join(SUFFIXES)}, each plain or {' or '.join(COMPRESSED)}"
        )
    return files


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(zstandard.open(path, "rb"))  # type: ignore[arg-type]
    return path.open("rb")


def local_documents(config: DataConfig, bad: BadRecords) -> Iterator[Document]:
    """Yield the documents of `data.input`; the sub-folder of a file names its source."""
    assert config.input is not None
    files = local_files(config.input)
    root = Path(config.input)
    if not root.is_dir():  # a glob: sources are the folders under what comes before its first wildcard
        root = Path(*_before_wildcard(root.parts))
    for path in files:
        place = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
        source = source_name(place.parts[0]) if len(place.parts) > 1 else source_name(config.name)
        found = False
        try:
            for document in _file_documents(path, source, config, bad):
                found = True
                yield document
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            bad.add(str(path), f"the compressed file is damaged or cut short ({error})")
        if not found and not bad.count:
            bad.add(str(path), "holds no document")


def _before_wildcard(parts: tuple[str, ...]) -> Iterator[str]:
    for part in parts[:-1]:
        if glob.has_magic(part):
            return
        yield part


def _file_documents(path: Path, source: str, config: DataConfig, bad: BadRecords) -> Iterator[Document]:
    with _open(path) as file:
        match _kind(path):
            case ".txt" if config.text_lines:
                for number, line in enumerate(file, 1):
                    text = _decoded(line, f"{path}:{number}", bad)
                    if text is not None and text.strip():
                        yield Document(text.strip(), source, f"{path}:{number}")
            case ".txt":
                text = _decoded(file.read(), str(path), bad)
                if text:
                    yield Document(text, source, str(path))
            case ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield from _record(line, source, f"{path}:{number}", config, bad)
            case ".json":
                yield from _json_list(file.read(), path, source, config, bad)


def _decoded(raw: bytes, place: str, bad: BadRecords) -> str | None:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad.add(place, f"not UTF-8 at byte {error.start}")
        return None


def _json_list(raw: bytes, path: Path, source: str, config: DataConfig, bad: BadRecords) -> Iterator[Document]:
    text = _decoded(raw, str(path), bad)
    if text is None:
        return
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        bad.add(str(path), f"not JSON: {error}")
        return
    if not isinstance(records, list):
        bad.add(str(path), "a .json file must hold a list of records; one record a line is .jsonl")
        return
    for number, record in enumerate(records):
        yield from from_record(record, source, f"{path}[{number}]", config, bad)


def _record(line: bytes, source: str, place: str, config: DataConfig, bad: BadRecords) -> Iterator[Document]:
    text = _decoded(line, place, bad)
    if text is None:
        return
    if config.raw_json:
        yield Document(text, source, place)
        return
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        bad.add(place, f"not JSON: {error}")
        return
    yield from from_record(record, source, place, config, bad)


def lookup(record: Any, dotted: str) -> Any:
    """Give a record's value at a dotted key, or None."""
    for part in dotted.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


def from_record(record: Any, source: str, place: str, config: DataConfig, bad: BadRecords) -> Iterator[Document]:
    """Yield the document of a record, if its text is a string that UTF-8 can hold."""
    text = lookup(record, config.text_key)
    if not isinstance(text, str):
        has = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        bad.add(place, f"data.text_key ({config.text_key}) is no string in it; it has {has}")
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        bad.add(place, "its text holds half a surrogate pair, which is no character")
        return
    if not text.strip():
        bad.empty += 1
        return
    named = lookup(record, config.source_key) if config.source_key else None
    yield Document(text, source_name(str(named)) if named else source, place)


def huggingface_documents(config: DataConfig, bad: BadRecords) -> Iterator[Document]:
    """Yield a dataset's documents, split as `train_test_split(valid_fraction, seed=valid_seed)` splits them."""
    import datasets
    from datasets.exceptions import DatasetsError

    name = str(config.dataset)
    try:
        dataset: Any = datasets.load_dataset(name, config.dataset_config, split=config.dataset_split)  # type: ignore[call-overload]
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"data.dataset ({name}) cannot be loaded: {reason}") from None
    parts = {"train": dataset}
    if config.valid_fraction and len(dataset) > 1:
        split = dataset.train_test_split(test_size=config.valid_fraction, seed=config.valid_seed)
        parts = {"train": split["train"], "valid": split["test"]}
    for part, rows in parts.items():
        for number, record in enumerate(rows):
            for document in from_record(record, source_name(config.name), f"{name}/{part}[{number}]", config, bad):
                document.split = part
                yield document
