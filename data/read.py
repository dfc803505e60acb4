"""Text cut into blocks by one process, so that many can make documents and tokens of them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any

from data.chat import lookup
from data.config import DataConfig, DataError, Source, Style
from data.cuts import last_space
from data.documents import Block, Document, from_record, not_json
from data.inputs import BadRecords, Item
from data.long import UnreadableError, decoded, long_line, long_member, long_text, scratch
from data.unpack import DAMAGE, PACKED, kind_of, unpacked

BLOCK_BYTES = 1 << 20  # of text in a block, or the record that is longer
BLOCK_RECORDS = 256
TEXT_BYTES = 1 << 22  # a longer document is handed on in parts
LONGEST_ESCAPE = 16  # characters, of two that make one
PARSER = json.JSONDecoder()


def blocks(
    item: Item, config: DataConfig, bad: BadRecords, *, skip: int = 0, last_cut: Callable[[str], int] = last_space
) -> Iterator[Block]:
    """Yield an item's blocks after the first `skip`; the same ones whoever reads them, and however often.

    A document that is too long to hold is cut where `last_cut` of the tokenizer allows it.
    """
    if item.dataset is not None:
        yield from _dataset_blocks(item, config, skip)
        return
    found = _builtin_blocks(item) if config.source is Source.builtin else _file_blocks(item, config, bad, last_cut)
    number, told = -1, bad.count
    try:
        for number, block in enumerate(found):
            if number >= skip:
                yield block
            else:
                bad.clear()  # it was told when it was read before
    except DAMAGE as error:
        bad.add(item.path, f"the compressed file is damaged or cut short ({error})")
    except OSError as error:
        if error.errno is not None or "://" in item.path:  # bz2 and gzip say OSError without a number of damage
            raise DataError(f"{item.path} cannot be read: {error}") from None
        bad.add(item.path, f"the compressed file is damaged or cut short ({error})")
    if number < 0 and bad.count == told:
        bad.add(item.path, "holds no document")


def _file_blocks(item: Item, config: DataConfig, bad: BadRecords, last_cut: Callable[[str], int]) -> Iterator[Block]:
    kind = kind_of(item.path)
    if kind == ".parquet":
        yield from _long_apart(_parquet_blocks(item, config, bad), config, bad, last_cut)
        return
    if kind == ".txt" and not config.text_lines:
        yield from _text_blocks(item, config, bad, last_cut)
        return
    with unpacked(item.path) as file:
        yield from (_json_blocks if kind == ".json" else _line_blocks)(file, item, config, bad, last_cut)


def _long_apart(
    found: Iterator[Block], config: DataConfig, bad: BadRecords, last_cut: Callable[[str], int]
) -> Iterator[Block]:
    """Yield blocks of records, and for one whose text is too long to hand around a block for each part of it."""
    for block in found:
        at, first = 0, block.first
        plain = config.style is Style.text and not config.raw_json
        for k, record in enumerate(block.payload if plain else []):
            text = lookup(record, config.text_key)
            if not isinstance(text, str) or len(text) <= TEXT_BYTES:
                continue
            if k > at:
                yield replace(block, first=first, payload=block.payload[at:k])
            at, first = k + 1, block.first + k + 1
            for document in from_record(record, f"{block.path}[{first - 1}]", block, config, bad):
                yield from long_text(document, partial(iter, [document.text]), config, bad, last_cut)
        if at < len(block.payload):
            yield replace(block, first=first, payload=block.payload[at:])


def _most(config: DataConfig) -> int:
    """Give the bytes of a record that may be held; a conversation is always held whole."""
    return TEXT_BYTES if config.style is Style.text else config.max_record_mb << 20


def _line_blocks(
    file: IO[bytes], item: Item, config: DataConfig, bad: BadRecords, last_cut: Callable[[str], int]
) -> Iterator[Block]:
    """Yield whole lines, about a block of them at a time, and a line that is too long to hold in parts."""
    kind = "text_lines" if kind_of(item.path) == ".txt" else "lines"
    number, parts, size = 1, [], 0
    rest: list[bytes] = []  # what was read after a long line
    while raw := (rest.pop() if rest else b"") or file.read(BLOCK_BYTES):
        end = raw.rfind(b"\n") + 1
        parts.append(raw[:end] if end else raw)
        size += len(parts[-1])
        if end:
            lines = b"".join(parts)
            parts, size = [raw[end:]], len(raw) - end
            yield Block(kind, item.path, item.source, item.split, number, lines)
            number += lines.count(b"\n")
        elif size > _most(config):
            line = _to_line_end(b"".join(parts), file, rest)
            block = Block(kind, f"{item.path}:{number}", item.source, item.split, number, None)
            if config.style is Style.text:
                yield from long_line(line, block, config, bad, last_cut)
            else:
                bad.add(block.path, f"a conversation of more than data.max_record_mb ({config.max_record_mb}) MB")
            for _ in line:
                pass
            number, parts, size = number + 1, [], 0
    if size:
        yield Block(kind, item.path, item.source, item.split, number, b"".join(parts))


def _to_line_end(begun: bytes, file: IO[bytes], rest: list[bytes]) -> Iterator[bytes]:
    """Yield a line that has begun, and keep what was read beyond it."""
    yield begun
    while raw := file.read(BLOCK_BYTES):
        if end := raw.find(b"\n") + 1:
            yield raw[:end]
            rest.append(raw[end:])
            return
        yield raw


def _text_blocks(item: Item, config: DataConfig, bad: BadRecords, last_cut: Callable[[str], int]) -> Iterator[Block]:
    """Yield a file that is one document: whole, or in parts."""
    with unpacked(item.path) as file:
        raw = file.read(TEXT_BYTES + 1)
    if len(raw) <= TEXT_BYTES:
        if raw:
            yield Block("text", item.path, item.source, item.split, 0, raw)
        return
    document = Document("", item.source, item.path, split=item.split)
    try:
        yield from long_text(document, partial(_decoded_file, item.path), config, bad, last_cut)
    except UnreadableError as error:
        bad.add(item.path, str(error))


def _decoded_file(path: str) -> Iterator[str]:
    with unpacked(path) as file:
        yield from decoded(iter(partial(file.read, BLOCK_BYTES), b""))


class _Window:
    """The part of a text that is being read."""

    def __init__(self, file: IO[bytes]) -> None:
        self.texts = decoded(iter(partial(file.read, BLOCK_BYTES), b""))
        self.text, self.at = "", 0
        self.over = False
        self.failure: Exception | None = None  # because of which it is over before its end

    def more(self) -> None:
        """Read on, to twice as much of what is not complete."""
        parts = [self.text[self.at :]]
        size, wanted = len(parts[0]), 2 * len(parts[0])
        try:
            while not parts[1:] or size < wanted:
                parts.append(next(self.texts))
                size += len(parts[-1])
        except StopIteration:
            self.over = True
        except (UnreadableError, OSError, *DAMAGE) as error:
            self.over, self.failure = True, error
        self.text, self.at = "".join(parts), 0

    def record_at(self) -> int:
        """Give the place after a comma."""
        at = self._skip_space(self.at)
        return self._skip_space(at + 1) if self.text[at : at + 1] == "," else at

    def _skip_space(self, at: int) -> int:
        while self.text[at : at + 1].isspace():
            at += 1
        return at

    def ends(self) -> bool:
        """Say whether there is no further record in the list."""
        while self.record_at() == len(self.text) and not self.over:
            self.more()
        return self.text[self.record_at() :][:1] == "]"

    def record(self, most: int) -> tuple[Any, int] | None:
        """Give the next record and its length, or None if that is over `most`.

        Raises `UnreadableError`, or what ended the text before its end.
        """
        while True:
            start = self.record_at()
            try:
                if "," not in self.text[self.at : start]:
                    raise json.JSONDecodeError("a comma is missing", self.text, start)
                record, end = PARSER.raw_decode(self.text, start)
                if self.over or len(self.text) - end > 2:  # a number may go on: 1 by e+2
                    self.at = end
                    return record, end - start
            except (ValueError, RecursionError) as error:
                if self.over or _is_certain(error, len(self.text)):
                    raise self.failure or UnreadableError(not_json(error, lambda at, start=start: at - start)) from None
            if len(self.text) - start > most:
                return None
            self.more()


def _is_certain(error: Exception, n_chars: int) -> bool:
    """Say whether json would find the same error if more of the text were there."""
    if not isinstance(error, json.JSONDecodeError):
        return True
    return error.pos < n_chars - LONGEST_ESCAPE and not error.msg.startswith("Unterminated")


def _json_blocks(
    file: IO[bytes], item: Item, config: DataConfig, bad: BadRecords, last_cut: Callable[[str], int]
) -> Iterator[Block]:
    """Yield the records of a top-level list, of which only a few are in memory at a time."""
    window = _Window(file)
    while not (begins := window.text.strip()[:1]) and not window.over:
        window.more()
    if begins and begins != "[":
        bad.add(item.path, "a .json file must hold a list of records; one record a line is .jsonl")
        return
    window.text = window.text.replace("[", ",", 1)  # so there is one before every record
    records: list[Any] = []
    number = size = 0
    failure = None if begins else window.failure
    try:
        while begins and not window.ends():
            found = window.record(_most(config))
            if found is not None:
                records.append(found[0])
                size += found[1]
                if size < BLOCK_BYTES:
                    continue
            if records:
                yield Block("records", item.path, item.source, item.split, number, records)
                number, records, size = number + len(records), [], 0
            if found is None and config.style is not Style.text:
                raise UnreadableError(f"a conversation of more than data.max_record_mb ({config.max_record_mb}) MB")
            if found is None:
                block = Block("member", f"{item.path}[{number}]", item.source, item.split, number, None)
                texts = chain([window.text[window.record_at() :]], window.texts)
                window.text, window.at = (yield from long_member(texts, block, config, bad, last_cut)), 0
                number += 1
    except (UnreadableError, OSError, *DAMAGE) as error:
        failure = error
    if records:
        yield Block("records", item.path, item.source, item.split, number, records)
    if isinstance(failure, UnreadableError):
        bad.add(f"{item.path}[{number + len(records)}]", str(failure))
    elif failure is not None:
        raise failure


def _parquet_blocks(item: Item, config: DataConfig, bad: BadRecords) -> Iterator[Block]:
    import pyarrow
    from pyarrow import parquet

    with scratch(config) as plain, unpacked(item.path) as file:
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
            about = table.metadata
            n_bytes = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
            n_rows = BLOCK_BYTES * about.num_rows // max(1, n_bytes)  # that fill a block
            for batch in table.iter_batches(batch_size=min(max(1, n_rows), BLOCK_RECORDS), columns=columns):
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
