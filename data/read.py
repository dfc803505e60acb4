"""Text from files and datasets: cut into blocks by one process, made into documents by many."""

import bz2
import codecs
import glob
import gzip
import io
import json
import lzma
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import xxhash
import zstandard

from data.chat import lookup, messages_of
from data.config import DataConfig, DataError, OnBadRecord, Source, Style
from data.tokenizer import PIECE_CHARS, cut

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
PACKED = (".gz", ".zst", ".xz", ".bz2")
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError, lzma.LZMAError)
PLACES_TOLD = 10
BLOCK_BYTES = 1 << 20  # of text in a block, or the record that is longer
BLOCK_RECORDS = 256
TEXT_BYTES = 1 << 24  # a longer .txt is read twice: once for its split, once for its text


@dataclass(slots=True)
class Document:
    """A document, or with `begins` or `ends` false a part of one that is too long to hold."""

    text: str
    source: str
    place: str  # file and record, for messages
    key: str | None = None  # what decides the split (None: the text)
    split: str | None = None  # where the dataset itself decides
    messages: list[dict[str, str]] | None = None  # of a conversation; `text` is then their JSON
    begins: bool = True
    ends: bool = True


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

    def merge(self, other: "BadRecords") -> None:
        self.count += other.count
        self.empty += other.empty
        self.places += other.places[: PLACES_TOLD - len(self.places)]


@dataclass(slots=True)
class Item:
    """What is read from its beginning to its end: a file, or a dataset."""

    path: str
    source: str
    split: str | None = None
    size: int = 0
    dataset: Any = None


@dataclass(slots=True)
class Block:
    """Some records of an item, not yet understood.

    Attributes:
        first: the number of the first record; lines count from 1, records from 0.
        payload: lines of JSON or text as bytes, a text, or records.
    """

    kind: str
    path: str
    source: str
    split: str | None
    first: int
    payload: Any
    begins: bool = True
    ends: bool = True


def source_name(name: str) -> str:
    """Make a name that is safe as a file's: `Wikipedia (en)` becomes `wikipedia_en`."""
    return re.sub(r"[^a-z0-9.+-]+", "_", name.lower()).strip("_.") or "unnamed"


# What there is to read


def items(config: DataConfig, bad: BadRecords) -> list[Item]:
    """List what a corpus is made of, in order; what is held out whole comes first."""
    match config.source:
        case Source.builtin:
            return [Item("the standard library", "code")]
        case Source.huggingface:
            return _dataset_items(config)
        case _:
            return _without_copies([*_local_items(config)], bad)


def _local_items(config: DataConfig) -> Iterator[Item]:
    name = source_name(config.name)
    if config.valid_input is not None:
        yield from (replace(item, split="valid") for item in local_files(config.valid_input, name, "data.valid_input"))
    if config.input is not None:
        found = local_files(config.input, name, "data.input")
    else:
        parts = config.sources.items()
        found = [replace(i, source=source_name(k)) for k, v in parts for i in local_files(v, name, f"data.sources.{k}")]
    yield from (replace(item, split="train") for item in found) if config.valid_input else found


def local_files(pattern: str, name: str, key: str) -> list[Item]:
    """List the readable files of a path, a folder, a glob or an fsspec address; a sub-folder names the source."""
    if "://" in pattern:
        root, paths = _remote_files(pattern)
    else:
        base = Path(pattern)
        found = base.rglob("*") if base.is_dir() else map(Path, glob.glob(pattern, recursive=True))
        paths = {str(path): path.stat().st_size for path in found if path.is_file()}
        # of a glob, sources are the folders under what comes before its first wildcard
        root = pattern if base.is_dir() else str(Path(*_before_wildcard(base.parts)))
    files = []
    for path in sorted(path for path in paths if _kind(path) in SUFFIXES):
        folders = Path(path.removeprefix(root).lstrip("/")).parts[:-1] if path.startswith(root) else ()
        files.append(Item(path, source_name(folders[0]) if folders else name, size=paths[path]))
    if not files:
        raise DataError(
            f"{key} ({pattern}) names no file that can be read: it takes {', '.join(SUFFIXES)}, "
            f"each plain or {', '.join(PACKED)}"
        )
    return files


def _before_wildcard(parts: tuple[str, ...]) -> Iterator[str]:
    for part in parts[:-1]:
        if glob.has_magic(part):
            return
        yield part


def _remote_files(address: str) -> tuple[str, dict[str, int]]:
    """List the files of an address such as s3://bucket/texts/*.jsonl.zst, with their sizes."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(address)
        if glob.has_magic(path):
            found = system.glob(path, detail=True)
            root = str(Path(*_before_wildcard(Path(path).parts)))
        else:
            found = system.find(path, detail=True) if system.isdir(path) else {path: system.info(path)}
            root = path if system.isdir(path) else str(Path(path).parent)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"data.input ({address}) cannot be listed: {error}") from None
    start = address.split("://")[0] + "://"
    sizes = {
        start + name.lstrip("/"): int(info.get("size") or 0) for name, info in found.items() if info["type"] == "file"
    }
    return start + root.lstrip("/"), sizes


def _without_copies(found: list[Item], bad: BadRecords) -> list[Item]:
    """Leave out files that have the bytes of an earlier one; only files of one size are compared."""
    kept: list[Item] = []
    by_size: dict[int, list[Item]] = {}
    for item in found:
        same = [
            other for other in by_size.get(item.size, []) if item.size and _digest(other.path) == _digest(item.path)
        ]
        if same:
            bad.add(item.path, f"has the same bytes as {same[0].path}")
        else:
            kept.append(item)
            by_size.setdefault(item.size, []).append(item)
    return kept


def _digest(path: str) -> bytes:
    digest = xxhash.xxh3_128()
    with _open_raw(path) as file:
        while raw := file.read(BLOCK_BYTES):
            digest.update(raw)
    return digest.digest()


def _dataset_items(config: DataConfig) -> list[Item]:
    """Load a dataset, split by `train_test_split(valid_fraction, seed=valid_seed)`, or whole if it streams."""
    import datasets
    from datasets.exceptions import DatasetsError

    name, source = str(config.dataset), source_name(config.name)
    try:
        dataset: Any = datasets.load_dataset(  # type: ignore[call-overload]
            name, config.dataset_config, split=config.dataset_split, streaming=config.streaming
        )
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"data.dataset ({name}) cannot be loaded: {reason}") from None
    if config.streaming or not config.valid_fraction or len(dataset) < 2:
        return [Item(name, source, split=None if config.streaming else "train", dataset=dataset)]
    split = dataset.train_test_split(test_size=config.valid_fraction, seed=config.valid_seed)
    parts = (("valid", split["test"]), ("train", split["train"]))
    return [Item(f"{name}/{part}", source, part, dataset=rows) for part, rows in parts]


# Blocks


def _kind(path: str) -> str:
    name = Path(path)
    return Path(name.stem).suffix if name.suffix in PACKED else name.suffix


def _open_raw(path: str) -> Any:
    if "://" not in path:
        return open(path, "rb")
    import fsspec

    return fsspec.open(path, "rb").open()  # type: ignore[union-attr]


@contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    """Open a file for its content, unpacked."""
    with _open_raw(path) as raw:
        match Path(path).suffix:
            case ".gz":
                file: Any = gzip.open(raw)  # noqa: SIM115
            case ".bz2":
                file = bz2.open(raw)  # noqa: SIM115
            case ".xz":
                file = lzma.open(raw)  # noqa: SIM115
            case ".zst":
                file = io.BufferedReader(_Zstandard(raw))
            case _:
                file = raw
        with file:
            yield file


class _Zstandard(io.RawIOBase):
    """Reads Zstandard frames; unlike `zstandard.open` it tells when the last one is cut short."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.frames = file, zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self.frame: Any = None
        self.packed = self.plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.plain:
            self.packed = self.packed or self.file.read(BLOCK_BYTES >> 3)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self.frame = self.frame or self.frames.decompressobj()
            self.plain = self.frame.decompress(self.packed)
            self.packed = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        count = min(len(buffer), len(self.plain))
        buffer[:count], self.plain = self.plain[:count], self.plain[count:]
        return count


def blocks(item: Item, config: DataConfig, bad: BadRecords, *, skip: int = 0) -> Iterator[Block]:
    """Yield an item's blocks after the first `skip`; the same ones whoever reads them, and however often."""
    if item.dataset is not None:
        yield from _dataset_blocks(item, config, skip)
        return
    found = _builtin_blocks(item) if config.source is Source.builtin else _file_blocks(item, config, bad)
    number = -1
    try:
        for number, block in enumerate(found):
            if number >= skip:
                yield block
    except DAMAGE as error:
        bad.add(item.path, f"the compressed file is damaged or cut short ({error})")
    except OSError as error:
        if error.errno is not None or "://" in item.path:  # bz2 and gzip say OSError without a number of damage
            raise DataError(f"{item.path} cannot be read: {error}") from None
        bad.add(item.path, f"the compressed file is damaged or cut short ({error})")
    if number < 0 and not bad.count:
        bad.add(item.path, "holds no document")


def _file_blocks(item: Item, config: DataConfig, bad: BadRecords) -> Iterator[Block]:
    kind = _kind(item.path)
    if kind == ".parquet":
        yield from _parquet_blocks(item, config, bad)
        return
    if kind == ".txt" and not config.text_lines:
        yield from _text_blocks(item, config, bad)
        return
    with _open(item.path) as file:
        if kind == ".json":
            yield from _json_blocks(file, item, config, bad)
        else:
            for first, lines in _lines(file, item.path, config.max_record_mb << 20, bad):
                yield Block(
                    "text_lines" if kind == ".txt" else "lines", item.path, item.source, item.split, first, lines
                )


def _lines(file: IO[bytes], path: str, longest: int, bad: BadRecords) -> Iterator[tuple[int, bytes]]:
    """Yield whole lines, about a block of them at a time, with the number of the first."""
    number, parts, size = 1, [], 0
    too_long = False
    while raw := file.read(BLOCK_BYTES):
        end = raw.rfind(b"\n") + 1
        if too_long and (first_end := raw.find(b"\n") + 1):
            raw, end, too_long = raw[first_end:], end - first_end, False
            number += 1
        if too_long:
            continue
        parts.append(raw[:end] if end else raw)
        size += len(parts[-1])
        if end:
            lines = b"".join(parts)
            if lines:
                yield number, lines
            number += lines.count(b"\n")
            parts, size = [raw[end:]], len(raw) - end
        elif size > longest:
            bad.add(f"{path}:{number}", f"a line of more than data.max_record_mb ({longest >> 20}) MB")
            parts, size, too_long = [], 0, True
    if size:
        yield number, b"".join(parts)


def _text_blocks(item: Item, config: DataConfig, bad: BadRecords) -> Iterator[Block]:
    """Yield a file that is one document: whole, or in parts that no piece of a vocabulary lies across."""
    with _open(item.path) as file:
        raw = file.read(TEXT_BYTES + 1)
    if len(raw) <= TEXT_BYTES:
        if raw:
            yield Block("text", item.path, item.source, item.split, 0, raw)
        return
    digest = xxhash.xxh3_64(seed=config.valid_seed)
    decode = codecs.getincrementaldecoder("utf-8-sig")
    try:
        for text in _decoded_parts(item.path, decode()):
            digest.update(text.encode())
    except UnicodeDecodeError as error:
        bad.add(item.path, f"not UTF-8: {error.reason}")
        return
    split = item.split or split_of(digest.intdigest(), config)
    begins, rest = True, ""
    for text in _decoded_parts(item.path, decode()):
        *parts, rest = cut(rest + text, PIECE_CHARS)
        for part in parts:
            yield Block("text", item.path, item.source, split, 0, part, begins, False)
            begins = False
    yield Block("text", item.path, item.source, split, 0, rest, begins, True)


def _decoded_parts(path: str, decoder: codecs.IncrementalDecoder) -> Iterator[str]:
    with _open(path) as file:
        while raw := file.read(BLOCK_BYTES):
            yield decoder.decode(raw)
    yield decoder.decode(b"", final=True)


def _json_blocks(file: IO[bytes], item: Item, config: DataConfig, bad: BadRecords) -> Iterator[Block]:
    """Yield the records of a top-level list, of which only a few are in memory at a time."""
    decoder, parser = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder()
    text, at, number, begun, over = "", 0, 0, False, False
    records: list[Any] = []
    size = 0
    while not over:
        raw = file.read(max(BLOCK_BYTES, len(text) - at))  # twice as much of a record that is not complete
        over = not raw
        try:
            text, at = text[at:] + decoder.decode(raw, final=over), 0
        except UnicodeDecodeError as error:
            bad.add(f"{item.path}[{number + len(records)}]", f"not UTF-8: {error.reason}")
            break
        if len(text) > config.max_record_mb << 20:
            bad.add(f"{item.path}[{number + len(records)}]", f"a record of more than {config.max_record_mb} MB")
            break
        if not begun and (stripped := text.lstrip()):
            begun = True
            if stripped[0] != "[":
                bad.add(item.path, "a .json file must hold a list of records; one record a line is .jsonl")
                return
            text = "," + stripped[1:]
        while True:
            at = _after_space(text, at)
            if text[at : at + 1] == "]":
                over = True
                break
            start = _after_space(text, at + 1)
            try:
                if text[at : at + 1] != ",":
                    raise json.JSONDecodeError("a comma is missing", text, at)
                record, end = parser.raw_decode(text, start)
            except json.JSONDecodeError as error:
                if text[start : start + 1] == "]":
                    over = True
                elif over or (error.pos < len(text) - 16 and not error.msg.startswith("Unterminated")):
                    bad.add(f"{item.path}[{number + len(records)}]", f"not JSON: {error.msg}")
                    over = True
                break
            if end == len(text) and not over:
                break  # a number may go on
            records.append(record)
            size += end - at
            at = end
            if size >= BLOCK_BYTES:
                yield Block("records", item.path, item.source, item.split, number, records)
                number, records, size = number + len(records), [], 0
    if records:
        yield Block("records", item.path, item.source, item.split, number, records)


def _after_space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _parquet_blocks(item: Item, config: DataConfig, bad: BadRecords) -> Iterator[Block]:
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as plain, _open(item.path) as file:
        if Path(item.path).suffix in PACKED:  # a Parquet file is read from its end
            while raw := file.read(BLOCK_BYTES):
                plain.write(raw)
            file = plain
        try:
            table = parquet.ParquetFile(file)
            columns = _columns(config, table.schema_arrow.names)
            if missing := [name for name in columns if name not in table.schema_arrow.names]:
                bad.add(item.path, f"has no column {missing[0]}; it has {', '.join(table.schema_arrow.names)}")
                return
            number = 0
            for batch in table.iter_batches(batch_size=BLOCK_RECORDS, columns=columns):
                yield Block("records", item.path, item.source, item.split, number, batch.to_pylist())
                number += batch.num_rows
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, UnicodeDecodeError) as error:
            bad.add(item.path, f"is no Parquet file that can be read: {str(error).splitlines()[0]}")


def _columns(config: DataConfig, names: list[str]) -> list[str]:
    """Name the columns that make a document; for the whole record, all."""
    match config.style:
        case Style.text if config.raw_json:
            return names
        case Style.text:
            wanted = [config.text_key]
        case Style.chat:
            wanted = [config.messages_key]
        case Style.alpaca:
            wanted = ["instruction", "output"] + (["input"] if "input" in names else [])
    wanted += [config.source_key] if config.source_key else []
    return list(dict.fromkeys(key.split(".")[0] for key in wanted))


def _dataset_blocks(item: Item, config: DataConfig, skip: int) -> Iterator[Block]:
    from datasets.exceptions import DatasetsError

    first = skip * BLOCK_RECORDS
    try:
        names = item.dataset.column_names
        wanted = _columns(config, names) if names else []
        rows = item.dataset.select_columns([name for name in wanted if name in names]) if wanted else item.dataset
        rows = rows.skip(first)
        for batch in rows.iter(BLOCK_RECORDS):
            records = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
            yield Block("records", item.path, item.source, item.split, first, records)
            first += len(records)
    except (OSError, DatasetsError) as error:
        raise DataError(
            f"data.dataset ({item.path}): record {first} cannot be read: {error}; run again to go on"
        ) from None


def _builtin_blocks(item: Item) -> Iterator[Block]:
    from data.builtin import builtin_documents

    found: list[Document] = []
    size = 0
    for document in builtin_documents():
        found.append(document)
        size += len(document.text)
        if size > BLOCK_BYTES:
            yield Block("documents", item.path, item.source, None, 0, found)
            found, size = [], 0
    yield Block("documents", item.path, item.source, None, 0, found)


# Documents


def split_of(digest: int, config: DataConfig) -> str:
    """Decide by content, so that a document stays where it is when others are added."""
    return "valid" if not config.valid_input and digest < config.valid_fraction * 2**64 else "train"


def digest_of(document: Document, config: DataConfig) -> int:
    return xxhash.xxh3_64_intdigest((document.key or document.text).encode(), seed=config.valid_seed)


def documents(block: Block, config: DataConfig, bad: BadRecords) -> Iterator[Document]:
    """Yield the documents of a block, each with its split."""
    for document in _documents(block, config, bad):
        if document.split is None:
            document.split = split_of(digest_of(document, config), config)
        yield document


def _documents(block: Block, config: DataConfig, bad: BadRecords) -> Iterator[Document]:
    match block.kind:
        case "documents":
            yield from block.payload
        case "text":
            text = block.payload if isinstance(block.payload, str) else _decoded(block.payload, block.path, bad)
            if text is not None and (text.strip() or not (block.begins and block.ends)):
                whole = (block.begins, block.ends)
                yield Document(text, block.source, block.path, None, block.split, None, *whole)
        case "records":
            for number, record in enumerate(block.payload, block.first):
                yield from _from_record(record, f"{block.path}[{number}]", block, config, bad)
        case "text_lines" | "lines":
            for number, line in enumerate(io.BytesIO(block.payload), block.first):
                if line.strip():
                    yield from _from_line(line, f"{block.path}:{number}", block, config, bad)


def _decoded(raw: bytes, place: str, bad: BadRecords) -> str | None:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad.add(place, f"not UTF-8 at byte {error.start}")
        return None


def _from_line(line: bytes, place: str, block: Block, config: DataConfig, bad: BadRecords) -> Iterator[Document]:
    text = _decoded(line, place, bad)
    if text is None:
        return
    if block.kind == "text_lines":
        yield Document(text.strip(), block.source, place, split=block.split)
        return
    if config.raw_json:
        yield Document(text, block.source, place, split=block.split)
        return
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        bad.add(place, f"not JSON: {error}")
        return
    yield from _from_record(record, place, block, config, bad)


def _from_record(record: Any, place: str, block: Block, config: DataConfig, bad: BadRecords) -> Iterator[Document]:
    """Yield the document of a record, if its text is a string that UTF-8 can hold."""
    messages = None
    if config.style is not Style.text:
        try:
            messages = messages_of(record, config.style.value, config.messages_key)
        except ValueError as error:
            bad.add(place, str(error))
            return
    if config.raw_json:
        text: Any = json.dumps(record)
    else:
        text = lookup(record, config.text_key) if messages is None else json.dumps(messages, ensure_ascii=False)
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
    source = source_name(str(named)) if named else block.source
    yield Document(text, source, place, split=block.split, messages=messages)
