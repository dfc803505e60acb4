"""Text cut into blocks by one process, so that many can make documents and tokens of them."""

import codecs
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import xxhash

from data.chat import lookup
from data.config import DataConfig, DataError, Source, Style
from data.documents import Block, Document, digest_of, documents, split_of
from data.inputs import BadRecords, Item
from data.tokenizer import PIECE_CHARS, cut, last_blank
from data.unpack import DAMAGE, PACKED, kind_of, unpacked

BLOCK_BYTES = 1 << 20  # of text in a block, or the record that is longer
BLOCK_RECORDS = 256
TEXT_BYTES = 1 << 24  # a longer .txt is read twice: once for its split, once for its text


def blocks(
    item: Item, config: DataConfig, bad: BadRecords, *, skip: int = 0, last_cut: Callable[[str], int] = last_blank
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
        for number, block in enumerate(_long_apart(found, config, bad, last_cut)):
            if number >= skip:
                yield block
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
        yield from _parquet_blocks(item, config, bad)
        return
    if kind == ".txt" and not config.text_lines:
        yield from _text_blocks(item, config, bad, last_cut)
        return
    with unpacked(item.path) as file:
        if kind == ".json":
            yield from _json_blocks(file, item, config, bad)
        else:
            for first, lines in _lines(file, item.path, config.max_record_mb << 20, bad):
                yield Block(
                    "text_lines" if kind == ".txt" else "lines", item.path, item.source, item.split, first, lines
                )


def _long_apart(
    found: Iterator[Block], config: DataConfig, bad: BadRecords, last_cut: Callable[[str], int]
) -> Iterator[Block]:
    """Yield blocks, and for a record whose text is too long to hand around a block for each part of it."""
    for block in found:
        long: list[tuple[int, int]] = []  # where such records begin and end in the payload
        if block.kind == "lines" and len(block.payload) > TEXT_BYTES and config.style is Style.text:
            long = [(0, len(block.payload))]
        elif block.kind == "records" and config.style is Style.text and not config.raw_json:
            texts = (lookup(record, config.text_key) for record in block.payload)
            long = [(k, k + 1) for k, text in enumerate(texts) if isinstance(text, str) and len(text) > TEXT_BYTES]
        at, first = 0, block.first
        for start, end in long:
            if start > at:
                yield replace(block, first=first, payload=block.payload[at:start])
                first += start - at
            yield from _parts(replace(block, first=first, payload=block.payload[start:end]), config, bad, last_cut)
            at, first = end, first + 1
        if at < len(block.payload):
            yield replace(block, first=first, payload=block.payload[at:])


def _parts(block: Block, config: DataConfig, bad: BadRecords, last_cut: Callable[[str], int]) -> Iterator[Block]:
    for document in documents(block, config, bad):
        done, digest = 0, digest_of(document, config)
        for part in cut(document.text, PIECE_CHARS, last_cut):
            begins, done = not done, done + len(part)
            whole = (begins, done == len(document.text), digest)
            yield Block("text", document.place, document.source, document.split, 0, part, *whole)


def _lines(file: IO[bytes], path: str, longest: int, bad: BadRecords) -> Iterator[tuple[int, bytes]]:
    """Yield whole lines, about a block of them at a time or one that is longer, with the number of the first."""
    number, parts, size = 1, [], 0
    too_long = False
    while raw := file.read(BLOCK_BYTES):
        if (too_long or size > TEXT_BYTES) and (end := raw.find(b"\n") + 1):
            if not too_long:
                lines = b"".join([*parts, raw[:end]])
                parts, size = [], 0
                yield number, lines
            number, raw, too_long = number + 1, raw[end:], False
        if too_long:
            continue
        end = raw.rfind(b"\n") + 1
        parts.append(raw[:end] if end else raw)
        size += len(parts[-1])
        if end:
            lines = b"".join(parts)
            parts, size = [raw[end:]], len(raw) - end
            if lines:
                yield number, lines
            number += lines.count(b"\n")
        elif size > longest:
            bad.add(f"{path}:{number}", f"a line of more than data.max_record_mb ({longest >> 20}) MB")
            parts, size, too_long = [], 0, True
    if size:
        yield number, b"".join(parts)


def _text_blocks(item: Item, config: DataConfig, bad: BadRecords, last_cut: Callable[[str], int]) -> Iterator[Block]:
    """Yield a file that is one document: whole, or in parts."""
    with unpacked(item.path) as file:
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
    whole = digest.intdigest()
    split = item.split or split_of(whole, config)
    begins, rest = True, ""
    for text in _decoded_parts(item.path, decode()):
        *parts, rest = cut(rest + text, PIECE_CHARS, last_cut)
        for part in parts:
            yield Block("text", item.path, item.source, split, 0, part, begins, False, whole)
            begins = False
    yield Block("text", item.path, item.source, split, 0, rest, begins, True, whole)


def _decoded_parts(path: str, decoder: codecs.IncrementalDecoder) -> Iterator[str]:
    with unpacked(path) as file:
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
            if len(text) - end <= 2 and not over:
                break  # a number may go on: 1 by e+2
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

    with tempfile.TemporaryFile() as plain, unpacked(item.path) as file:
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
