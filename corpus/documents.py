"""Records to documents, each with its source, its split and the hash of its text; the others are left out."""

import json
from dataclasses import dataclass
from typing import Any

import xxhash

from corpus.chat import describe_missing, lookup, messages_of
from corpus.config import CorpusConfig, Style
from corpus.inputs import Item, source_name
from corpus.left_out import LeftOut

MOST_SOURCE_CHARS = 100


@dataclass(slots=True)
class Document:
    """A document of a corpus.

    Attributes:
        hash: xxh3_64 of the text; of equal ones a corpus holds the first.
        messages: of a conversation; `text` is then their JSON.
    """

    text: str
    source: str
    split: str
    place: str
    hash: int
    text_bytes: int
    messages: list[dict[str, str]] | None = None


def make_document(
    text: str,
    item: Item,
    place: str,
    config: CorpusConfig,
    left_out: LeftOut,
    *,
    source: str | None = None,
    split_key: str | None = None,
    messages: list[dict[str, str]] | None = None,
) -> Document | None:
    """Return the document of a text, or None if it is empty, too large or not Unicode.

    Its split is the item's, or decided by the hash of the text (of `split_key`, where files stay together), so that a
    document stays where it is when others are added.
    """
    if not text or text.isspace():
        left_out.empty += 1
        return None
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        left_out.bad(place, "the text holds half a surrogate pair")
        return None
    if len(raw) > config.max_document_mb << 20:
        left_out.bad(place, too_large(config))
        return None
    digest = xxhash.xxh3_64_intdigest(raw, seed=config.valid_seed)
    split = item.split
    if split is None:
        key = digest if split_key is None else xxhash.xxh3_64_intdigest(split_key.encode(), seed=config.valid_seed)
        split = "valid" if not config.valid_input and key < config.valid_fraction * 2**64 else "train"
    return Document(text, source or item.source, split, place, digest, len(raw), messages)


def too_large(config: CorpusConfig) -> str:
    return f"is larger than data.max_document_mb ({config.max_document_mb})"


def from_bytes(
    raw: bytes, item: Item, place: str, config: CorpusConfig, left_out: LeftOut, *, strip: bool = False
) -> Document | None:
    """Return the document that a whole file, or a line of plain text, is."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        left_out.bad(place, f"not UTF-8 at byte {error.start}")
        return None
    return make_document(text.strip() if strip else text, item, place, config, left_out)


def from_line(line: bytes, item: Item, place: str, config: CorpusConfig, left_out: LeftOut) -> Document | None:
    """Return the document of a line of JSON."""
    if config.raw_json and not config.source_key:
        return from_bytes(line, item, place, config, left_out)
    try:
        text = line.decode("utf-8-sig")
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        left_out.bad(place, f"not JSON: {error}")
        return None
    return from_record(record, item, place, config, left_out, line=text)


def from_record(
    record: Any, item: Item, place: str, config: CorpusConfig, left_out: LeftOut, *, line: str | None = None
) -> Document | None:
    """Return the document of a record; `line` is its JSON as it was written, if it was."""
    messages = None
    try:
        if isinstance(record, ValueError):  # of a row that cannot be read
            raise record
        if config.style is not Style.text:
            messages = messages_of(record, config.style.value, config.messages_key)
            text: Any = json.dumps(messages, ensure_ascii=False)
        elif config.raw_json:
            text = json.dumps(record) if line is None else line
        else:
            text = lookup(record, config.text_key)
    except (ValueError, TypeError) as error:  # no messages, or what JSON cannot hold, such as Parquet's dates
        left_out.bad(place, str(error))
        return None
    if not isinstance(text, str):
        left_out.bad(place, describe_missing(record, "data.text_key", config.text_key, "a string"))
        return None
    named = (lookup(record, config.source_key) if config.source_key else None) or None
    if named is not None and (isinstance(named, dict | list) or len(str(named)) > MOST_SOURCE_CHARS):
        left_out.bad(place, f"data.source_key ({config.source_key}) must be a name of {MOST_SOURCE_CHARS} characters")
        return None
    source = None if named is None else source_name(str(named))
    return make_document(text, item, place, config, left_out, source=source, messages=messages)
