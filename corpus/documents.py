"""Converts records to documents with source, split and hash; counts those left out."""

import json
from dataclasses import dataclass, field
from typing import Any

import xxhash

from corpus.chat import Messages, describe_missing, lookup, messages_of
from corpus.config import CorpusConfig, DataError, OnBadRecord, Style
from corpus.inputs import Item

MOST_SOURCE_CHARS = 100
MOST_PLACES = 10  # of bad records


@dataclass(slots=True)
class LeftOut:
    """Counts of records left out, and the places of the first bad ones."""

    policy: OnBadRecord
    count: int = 0  # bad records
    empty: int = 0
    duplicates: int = 0
    places: list[str] = field(default_factory=list)

    def bad(self, place: str, reason: str) -> None:
        """Count a bad record; raise `DataError` if the policy is `error`."""
        if self.policy is OnBadRecord.error:
            raise DataError(f"{place}: {reason}; fix it, or leave such records out with data.on_bad_record=skip")
        self.merge({"count": 1, "empty": 0, "duplicates": 0, "places": [f"{place}: {reason}"]})

    def merge(self, other: dict[str, Any]) -> None:
        """Add the `as_json()` of another instance."""
        self.count += other["count"]
        self.empty += other["empty"]
        self.duplicates += other["duplicates"]
        self.places = [*self.places, *other["places"]][:MOST_PLACES]

    def as_json(self) -> dict[str, Any]:
        return {"count": self.count, "empty": self.empty, "duplicates": self.duplicates, "places": self.places}

    def first(self) -> str:
        """Return the number of bad records and the first, to append to a message."""
        return f"; bad records: {self.count}, the first {self.places[0]}" if self.count else ""


@dataclass(slots=True)
class Document:
    text: str  # of a conversation, the JSON of its messages
    source: str
    split: str
    place: str
    hash: int  # xxh3_64 of the text, for deduplication
    text_bytes: int
    messages: Messages | None = None


class DocumentMaker:
    """Makes documents of the records of an item; returns None for those left out."""

    def __init__(self, item: Item, config: CorpusConfig, left_out: LeftOut) -> None:
        self.item, self.config, self.left_out = item, item.config or config, left_out
        self.most_bytes = config.max_document_mb << 20

    def too_large(self, place: str) -> None:
        self.left_out.bad(place, f"is larger than data.max_document_mb ({self.config.max_document_mb})")

    def from_text(
        self, text: str, place: str, source: str = "", *, split_key: str = "", messages: Messages | None = None
    ) -> Document | None:
        """Return the document of a text; its split is the item's, or by the hash of `split_key` or the text."""
        config = self.config
        if not text or text.isspace():
            self.left_out.empty += 1
            return None
        try:
            raw = text.encode()
        except UnicodeEncodeError:
            return self.left_out.bad(place, "the text has a lone surrogate")
        if len(raw) > self.most_bytes:
            return self.too_large(place)
        digest = xxhash.xxh3_64_intdigest(raw, seed=config.valid_seed)
        split = self.item.split
        if split is None:
            key = xxhash.xxh3_64_intdigest(split_key.encode(), seed=config.valid_seed) if split_key else digest
            split = "valid" if not config.valid_input and key < config.valid_fraction * 2**64 else "train"
        return Document(text, source or self.item.source, split, place, digest, len(raw), messages)

    def from_bytes(self, raw: bytes, place: str, *, strip: bool = False) -> Document | None:
        """Return the document of a text file or of a line of plain text."""
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return self.left_out.bad(place, f"not UTF-8 at byte {error.start}")
        return self.from_text(text.strip() if strip else text, place)

    def from_line(self, line: bytes, place: str) -> Document | None:
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            return self.left_out.bad(place, f"not JSON: {error}")
        return self.from_record(record, place)

    def from_record(self, record: Any, place: str) -> Document | None:
        config, messages = self.config, None
        text: Any = lookup(record, config.text_key)
        if config.style is not Style.text:
            try:
                messages = messages_of(record, config.style.value, config.messages_key)
                text = json.dumps(messages, ensure_ascii=False)
            except (ValueError, TypeError) as error:  # no messages, or values that JSON lacks, such as dates
                return self.left_out.bad(place, str(error))
        elif not isinstance(text, str):
            return self.left_out.bad(place, describe_missing(record, config.text_key, "a string", "data.text_key"))
        source = (lookup(record, config.source_key) if config.source_key else None) or ""
        if isinstance(source, dict | list) or len(str(source)) > MOST_SOURCE_CHARS:
            return self.left_out.bad(place, f"data.source_key ({config.source_key}) must be a short name")
        return self.from_text(text, place, str(source), messages=messages)
