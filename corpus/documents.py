"""Documents made of what was read, each with its source and its split; what cannot be one is told."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import xxhash

from corpus.chat import lookup, messages_of, not_there
from corpus.config import Style
from corpus.inputs import BadRecords, source_name
from corpus.rows import records
from data.config import DataConfig

SOURCE_CHARS = 100  # of a source's name, which files are named by
HALF_A_PAIR = "its text holds half a surrogate pair, which is no character"


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
    digest: int | None = None  # of the whole of which this is a part


@dataclass(slots=True)
class Block:
    """Some records of an item, not yet understood.

    Attributes:
        first: the number of the first record; lines count from 1, records from 0.
        payload: lines of JSON or text as bytes, a text, records, or rows as an Arrow stream.
    """

    kind: str
    path: str
    source: str
    split: str | None
    first: int
    payload: Any
    begins: bool = True
    ends: bool = True
    digest: int | None = None  # of the document of which the text is a part


def split_of(digest: int, config: DataConfig) -> str:
    """Decide by content, so that a document stays where it is when others are added."""
    return "valid" if not config.valid_input and digest < config.valid_fraction * 2**64 else "train"


def digest_of(document: Document, config: DataConfig) -> int:
    if document.digest is not None:
        return document.digest
    return xxhash.xxh3_64_intdigest((document.key or document.text).encode(), seed=config.valid_seed)


def documents(block: Block, config: DataConfig, bad: BadRecords) -> Iterator[Document]:
    """Yield the documents of a block, each with its split."""
    for document in _documents(block, config, bad):
        if document.begins and document.ends and not document.text.strip():
            bad.empty += 1
            continue
        if document.split is None:
            document.split = split_of(digest_of(document, config), config)
        yield document


def _documents(block: Block, config: DataConfig, bad: BadRecords) -> Iterator[Document]:
    match block.kind:
        case "documents":
            yield from block.payload
        case "text":
            text = block.payload if isinstance(block.payload, str) else _decoded(block.payload, block.path, bad)
            if text is not None:
                whole = (block.begins, block.ends, block.digest)
                yield Document(text, block.source, block.path, None, block.split, None, *whole)
        case "records" | "rows":
            found = block.payload if block.kind == "records" else records(block.payload)
            for number, record in enumerate(found, block.first):
                place = f"{block.path}[{number}]"
                if isinstance(record, ValueError):
                    bad.add(place, unreadable(record))
                else:
                    yield from from_record(record, place, block, config, bad)
        case "text_lines" | "lines":
            one = block.payload.find(b"\n", 0, -1) < 0  # perhaps too long to be copied
            for number, line in enumerate([block.payload] if one else io.BytesIO(block.payload), block.first):
                if not line.isspace():
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
    if is_plain(block, config):
        yield Document(text if config.raw_json else text.strip(), block.source, place, split=block.split)
        return
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        bad.add(place, not_json(error))
        return
    yield from from_record(record, place, block, config, bad, line=text)


def is_plain(block: Block, config: DataConfig) -> bool:
    """Say whether a line is a document without being parsed."""
    return block.kind == "text_lines" or (config.raw_json and not config.source_key)


def not_json(error: Exception, place: Callable[[int], int] = int) -> str:
    """Say why json took no record; `place` gives the place in the record of one in what json was given."""
    match error:
        case json.JSONDecodeError():
            reason = error.msg.rstrip(": ").removesuffix(" at").removesuffix(" starting")
            return f"not JSON: {reason} at character {place(error.pos)}"
        case RecursionError():
            return "not JSON that can be read: it is nested too deeply"
        case _:
            return f"not JSON that can be read: {error}"  # a number of thousands of digits


def unreadable(error: ValueError) -> str:
    return f"not UTF-8 at byte {error.start} of a cell" if isinstance(error, UnicodeDecodeError) else not_json(error)


def from_record(
    record: Any, place: str, block: Block, config: DataConfig, bad: BadRecords, *, line: str | None = None
) -> Iterator[Document]:
    """Yield the document of a record, if it has a source, and a text that UTF-8 can hold.

    `line` is how the record is written, where it is written in one.
    """
    messages = None
    if config.style is not Style.text:
        try:
            messages = messages_of(record, config.style.value, config.messages_key)
        except ValueError as error:
            bad.add(place, str(error))
            return
    if config.raw_json:
        try:
            text: Any = json.dumps(record) if line is None else line
        except TypeError as error:  # of Parquet: bytes, dates
            bad.add(place, f"cannot be written as JSON, as data.raw_json asks: {error}")
            return
    else:
        text = lookup(record, config.text_key) if messages is None else json.dumps(messages, ensure_ascii=False)
    if not isinstance(text, str):
        bad.add(place, f"data.text_key ({config.text_key}) {not_there(record, config.text_key, 'a string')}")
        return
    named = (lookup(record, config.source_key) if config.source_key else None) or None
    if named is not None and (isinstance(named, dict | list) or len(str(named)) > SOURCE_CHARS):
        bad.add(place, f"data.source_key ({config.source_key}) is no name of at most {SOURCE_CHARS} characters in it")
        return
    try:
        _ = text.isascii() or text.encode()
    except UnicodeEncodeError:
        bad.add(place, HALF_A_PAIR)
        return
    source = block.source if named is None else source_name(str(named))
    yield Document(text, source, place, split=block.split, messages=messages)
