"""Text cut into blocks by one process, so that many can make documents and tokens of them."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import IO, Any

from corpus.compression import DamageError, kind_of, packing_of, unpacked
from corpus.config import DataError, Source, Style, cause_of
from corpus.documents import Block, Document
from corpus.inputs import BadRecords, Item
from corpus.json_list import Window
from corpus.long import UnreadableError, decoded, long_line, long_member, long_row, long_text, scratch
from corpus.rows import plain, serialized
from data.config import DataConfig
from data.safe_split import last_space

BLOCK_BYTES = 1 << 20  # of text in a block, or the record that is longer
BLOCK_RECORDS = 256
TEXT_BYTES = 1 << 22  # a longer document is handed on in parts


def blocks(
    item: Item, config: DataConfig, bad: BadRecords, *, skip: int = 0, last_cut: Callable[[str], int] = last_space
) -> Iterator[Block]:
    """Yield an item's blocks after the first `skip`; the same ones whoever reads them, and however often.

    A document that is too long to hold is cut where `last_cut` of the tokenizer allows it.
    """
    match config.source:
        case Source.builtin:
            found = _builtin_blocks(item)
        case Source.huggingface:
            found = _dataset_blocks(item, config, bad, last_cut)
        case _:
            found = _file_blocks(item, config, bad, last_cut)
    number, told = -1, bad.count
    try:
        for number, block in enumerate(found):
            if number >= skip:
                yield block
            else:
                bad.clear()  # it was told when it was read before
    except DamageError as error:
        bad.add(item.path, str(error))
    except OSError as error:
        raise DataError(f"{item.path} cannot be read: {error}") from None
    if number < 0 and bad.count == told:
        bad.add(item.path, "holds no document")


def _file_blocks(item: Item, config: DataConfig, bad: BadRecords, last_cut: Callable[[str], int]) -> Iterator[Block]:
    kind = kind_of(item.path)
    if kind == ".txt" and not config.text_lines:
        yield from _text_blocks(item, config, bad, last_cut)
        return
    readers = {".parquet": _parquet_blocks, ".json": _json_blocks}
    with unpacked(item.path) as file:
        yield from readers.get(kind, _line_blocks)(file, item, config, bad, last_cut)


def _most(config: DataConfig) -> int:
    """Give the bytes of a record that may be held; a conversation is always held whole."""
    return TEXT_BYTES if config.style is Style.text else config.max_document_mb << 20


def _line_blocks(
    file: IO[bytes], item: Item, config: DataConfig, bad: BadRecords, last_cut: Callable[[str], int]
) -> Iterator[Block]:
    """Yield whole lines, about a block of them at a time, and a line that is too long to hold in parts."""
    kind = "text_lines" if kind_of(item.path) == ".txt" else "lines"
    number, parts, size = 1, [], 0
    rest: list[bytes] = []  # what was read after a long line
    try:
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
                    bad.add(
                        block.path, f"a conversation of more than data.max_document_mb ({config.max_document_mb}) MB"
                    )
                for _ in line:
                    pass
                number, parts, size = number + 1, [], 0
    except DamageError as error:
        bad.add(f"{item.path}:{number}", str(error))
        size = 0  # the line that is not whole is part of what is damaged
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
        _ = file.read(1)  # where it is damaged, what comes before is no document
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


def _json_blocks(
    file: IO[bytes], item: Item, config: DataConfig, bad: BadRecords, last_cut: Callable[[str], int]
) -> Iterator[Block]:
    """Yield the records of a top-level list, of which only a few are in memory at a time."""
    window = Window(decoded(iter(partial(file.read, BLOCK_BYTES), b"")))
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
                raise UnreadableError(f"a conversation of more than data.max_document_mb ({config.max_document_mb}) MB")
            if found is None:
                block = Block("member", f"{item.path}[{number}]", item.source, item.split, number, None)
                texts = chain([window.text[window.record_at() :]], window.texts)
                window.text, window.at = (yield from long_member(texts, block, config, bad, last_cut)), 0
                number += 1
        if begins and window.goes_on():
            raise UnreadableError("there is more after the list that a .json file holds; one record a line is .jsonl")
    except (UnreadableError, DamageError) as error:
        failure = error
    if records:
        yield Block("records", item.path, item.source, item.split, number, records)
    if failure is not None:
        bad.add(f"{item.path}[{number + len(records)}]", str(failure))


def _parquet_blocks(
    file: IO[bytes], item: Item, config: DataConfig, bad: BadRecords, last_cut: Callable[[str], int]
) -> Iterator[Block]:
    import pyarrow
    from pyarrow import parquet

    with scratch(config) as plain:
        if packing_of(item.path):  # a Parquet file is read from its end
            while raw := file.read(BLOCK_BYTES):
                plain.write(raw)
            file = plain
        try:
            # without these a whole group of rows, which may be the whole file, is in memory
            table = parquet.ParquetFile(file, pre_buffer=False, buffer_size=BLOCK_BYTES)
        except (pyarrow.ArrowException, OSError) as error:
            _refuse_no_damage(item, error)
            bad.add(item.path, f"is no Parquet file that can be read: {_first_line(error)}")
            return
        try:
            columns = _columns(config, table.schema_arrow.names)
        except ValueError as error:
            bad.add(item.path, str(error))
            return
        for number, batch in _batches(table, columns, item, bad):
            yield from _row_blocks(batch, number, item, config, bad, last_cut)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")


def _batches(table: Any, columns: list[str], item: Item, bad: BadRecords) -> Iterator[tuple[int, Any]]:
    """Yield a Parquet file's rows, of which a block or so is in memory, with the number of the first."""
    import pyarrow

    end = 0
    for group in range(table.num_row_groups):
        about = table.metadata.row_group(group)
        found = [about.column(i) for i in range(about.num_columns)]
        n_bytes = sum(c.total_uncompressed_size for c in found if c.path_in_schema.split(".")[0] in columns)
        number, end = end, end + about.num_rows
        try:
            for batch in table.iter_batches(_rows(about.num_rows, n_bytes), [group], columns, use_threads=False):
                yield number, batch
                number += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            _refuse_no_damage(item, error)
            bad.add(f"{item.path}[{number}]", f"rows up to {end - 1} are damaged: {_first_line(error)}")


def _rows(n_rows: int, n_bytes: int) -> int:
    """Give how many rows fill a block."""
    return min(max(1, BLOCK_BYTES * n_rows // max(1, n_bytes)), BLOCK_RECORDS)


def _refuse_no_damage(item: Item, error: Exception) -> None:
    """Raise again what the disk or the network says; of damage Arrow says OSError without a number."""
    if isinstance(error, OSError) and (error.errno is not None or "://" in item.path):
        raise error


def _row_blocks(
    batch: Any, first: int, item: Item, config: DataConfig, bad: BadRecords, last_cut: Callable[[str], int]
) -> Iterator[Block]:
    """Yield the rows of an Arrow batch: as they lie, about a block of them at a time, and a long one in parts."""
    batch = plain(batch)
    for start, stop in _runs(batch):
        rows, number = batch.slice(start, stop - start), first + start
        n_bytes, place = rows.nbytes, f"{item.path}[{number}]"
        if stop - start > 1 or n_bytes <= _most(config):
            yield Block("rows", item.path, item.source, item.split, number, serialized(rows))
        elif config.style is not Style.text:
            bad.add(place, f"a conversation of more than data.max_document_mb ({config.max_document_mb}) MB")
        else:
            row = dict(zip(rows.schema.names, rows.columns, strict=True))
            block = Block("row", place, item.source, item.split, number, None)
            yield from long_row(row, n_bytes, block, config, bad, last_cut)


def _runs(batch: Any) -> Iterator[tuple[int, int]]:
    """Divide a batch into runs of about a block; a row that is longer is one of its own."""
    start = size = 0
    for row in range(batch.num_rows if batch.nbytes > 2 * BLOCK_BYTES else 0):
        n_bytes = batch.slice(row, 1).nbytes
        if row > start and size + n_bytes > BLOCK_BYTES:
            yield start, row
            start, size = row, 0
        size += n_bytes
    if start < batch.num_rows:
        yield start, batch.num_rows


def _columns(config: DataConfig, names: list[str]) -> list[str]:
    """Name the columns that make a document; for the whole record, all. Raises `ValueError` if one is missing."""
    match config.style:
        case Style.text if config.raw_json:
            return names
        case Style.text:
            wanted = [config.text_key]
        case Style.chat:
            wanted = [config.messages_key]
        case Style.alpaca:
            wanted = ["instruction", "output"]
    wanted = [key.split(".")[0] for key in wanted]
    if missing := [name for name in wanted if name not in names]:
        raise ValueError(f"has no column {missing[0]}; it has {', '.join(names)}")
    perhaps = ["input"] * (config.style is Style.alpaca) + [(config.source_key or "").split(".")[0]]
    return list(dict.fromkeys([*wanted, *(name for name in perhaps if name in names)]))


def _dataset_blocks(item: Item, config: DataConfig, bad: BadRecords, last_cut: Callable[[str], int]) -> Iterator[Block]:
    number = 0
    for table in _tables(item, config):
        for batch in table.combine_chunks().to_batches():
            yield from _row_blocks(batch, number, item, config, bad, last_cut)
            number += batch.num_rows


def _tables(item: Item, config: DataConfig) -> Iterator[Any]:
    """Yield a dataset's rows as Arrow tables; of one that streams, which has no size, `BLOCK_RECORDS` at a time."""
    import pyarrow
    from datasets.exceptions import DatasetsError

    rows, number, n_rows = item.dataset, 0, BLOCK_RECORDS
    if not config.streaming:
        n_rows = _rows(rows.data.num_rows, rows.data.nbytes)
    try:
        names = rows.column_names and _columns(config, rows.column_names)
    except ValueError as error:
        raise DataError(f"data.dataset ({item.path}) {error}") from None
    try:
        for table in (rows.select_columns(names) if names else rows).with_format("arrow").iter(n_rows):
            yield table
            number += len(table)
    except (OSError, ValueError, pyarrow.ArrowException, DatasetsError) as error:
        raise DataError(
            f"data.dataset ({item.path}): record {number} cannot be read: {cause_of(error)}; run again to go on"
        ) from None


def _builtin_blocks(item: Item) -> Iterator[Block]:
    from corpus.builtin import builtin_documents

    found: list[Document] = []
    size = 0
    for document in builtin_documents():
        found.append(document)
        size += len(document.text)
        if size > BLOCK_BYTES:
            yield Block("documents", item.path, item.source, None, 0, found)
            found, size = [], 0
    yield Block("documents", item.path, item.source, None, 0, found)
