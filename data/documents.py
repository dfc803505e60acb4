"""Documents made of what was read, each with its source and its split; what cannot be one is told."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import xxhash

from data.chat import lookup, messages_of
from data.config import DataConfig, Style
from data.inputs import BadRecords, source_name


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
                whole = (block.begins, block.ends, block.digest)
                yield Document(text, block.source, block.path, None, block.split, None, *whole)
        case "records":
            for number, record in enumerate(block.payload, block.first):
                yield from _from_record(record, f"{block.path}[{number}]", block, config, bad)
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
        _ = text.isascii() or text.encode()
    except UnicodeEncodeError:
        bad.add(place, "its text holds half a surrogate pair, which is no character")
        return
    if not text.strip():
        bad.empty += 1
        return
    named = lookup(record, config.source_key) if config.source_key else None
    source = source_name(str(named)) if named else block.source
    yield Document(text, source, place, split=block.split, messages=messages)
