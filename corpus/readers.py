"""Readers of documents from ranges of files and datasets."""

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from shutil import copyfileobj
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from corpus.builtin import builtin_texts
from corpus.compression import DAMAGE, open_content, split_suffix
from corpus.config import CorpusConfig, DataError, Source, Style, cause_of
from corpus.documents import Document, DocumentMaker, LeftOut
from corpus.inputs import Item

if TYPE_CHECKING:
    import pyarrow

READ_BYTES = 1 << 17  # fits in the CPU cache; gzip lines are half as fast with 1 << 20
DATASET_ROWS = 64  # per read of a dataset or a Parquet file
END = sys.maxsize


class Lines:
    """The lines of a file by byte ranges; ranges in ascending order take one pass over a compressed file."""

    def __init__(self, path: str, longest: int = 1 << 40) -> None:
        self.path, self.longest, self.file = path, longest, io.BufferedReader(open_content(path), READ_BYTES)
        self.position = 0  # of the next line
        self.before = 0  # lines starting before this offset have been read

    def read(self, start: int, stop: int) -> Iterator[tuple[int, bytes | None]]:
        """Yield offset and content of each line that starts in [start, stop); None for one that is too long."""
        if start > self.position:
            if not split_suffix(self.path)[1]:
                self.position = self.file.seek(start - 1)
            while self.position < start - 1 and (skipped := self.file.read(min(READ_BYTES, start - 1 - self.position))):
                self.position += len(skipped)
            self._skip_line()
        while self.position < stop and (line := self.file.readline(self.longest + 1)):
            at, self.position = self.position, self.position + len(line)
            if len(line) > self.longest and line[-1:] != b"\n":
                self._skip_line()
            yield at, None if len(line) > self.longest else line
        self.before = stop

    def _skip_line(self) -> None:
        while part := self.file.readline(READ_BYTES):
            self.position += len(part)
            if part[-1:] == b"\n":
                return


def has_lines(item: Item, config: CorpusConfig) -> bool:
    """Return whether each line of a file is a document."""
    kind = split_suffix(item.path)[0]
    return kind == ".jsonl" or (config.text_lines and kind in config.text_suffixes)


class Reader:
    """Reads ranges of items; keeps the last compressed file open for its next range."""

    def __init__(self, config: CorpusConfig) -> None:
        self.config = config
        self.lines: Lines | None = None

    def documents(self, item: Item, left_out: LeftOut, start: int = 0, stop: int = END) -> Iterator[Document]:
        """Yield the documents of an item that start in bytes [start, stop) of its decompressed content."""
        try:
            yield from filter(None, self._documents(item, DocumentMaker(item, self.config, left_out), start, stop))
        except DAMAGE as error:
            left_out.bad(item.path, f"damaged or truncated: {error}")
        except OSError as error:
            if error.errno is not None or "://" in item.path:
                raise DataError(f"{item.path} cannot be read: {error}") from None
            left_out.bad(item.path, f"damaged or truncated: {cause_of(error)}")  # of gzip, bz2 and pyarrow

    def rows(
        self, batches: "Iterable[pyarrow.RecordBatch]", item: Item, left_out: LeftOut, first: int = 0
    ) -> Iterator[Document]:
        """Yield the documents of a dataset's rows; `first` is the index of the first row."""
        from datasets import Features

        make = DocumentMaker(item, self.config, left_out)
        for batch in batches:
            decode = Features.from_arrow_schema(batch.schema).decode_example  # JSON, where rows differ in shape
            yield from filter(None, documents_of(batch, make, first, decode))
            first += len(batch)

    def close(self) -> None:
        if self.lines is not None:
            self.lines.file.close()
        self.lines = None

    def _documents(self, item: Item, make: DocumentMaker, start: int, stop: int) -> Iterator[Document | None]:
        kind, compression = split_suffix(item.path)
        if self.config.source is Source.builtin:
            for text, source, place, key in builtin_texts(item.path):
                yield make.from_text(text, place, source, split_key=key)
        elif item.dataset is not None:
            yield from self.rows(dataset_batches(item, self.config), item, make.left_out)
        elif has_lines(item, make.config):
            yield from self._lines(item, make, start, stop)
        else:
            with open_content(item.path) as file:
                if kind in make.config.text_suffixes:
                    yield make.from_bytes(file.read(make.most_bytes + 1), item.path)
                elif kind == ".json":
                    yield from self._json(file, make)
                elif not compression:
                    yield from self._parquet(file, make, start, stop)
                else:  # Parquet needs a seekable file
                    with TemporaryFile() as copy:
                        copyfileobj(file, copy, READ_BYTES)
                        yield from self._parquet(copy, make, start, stop)

    def _lines(self, item: Item, make: DocumentMaker, start: int, stop: int) -> Iterator[Document | None]:
        if self.lines is not None and (self.lines.path != item.path or self.lines.before > start):
            self.close()
        self.lines = lines = self.lines or Lines(item.path, make.most_bytes)
        kind, compression = split_suffix(item.path)
        try:
            for number, (at, line) in enumerate(lines.read(start, stop), 1):
                place = f"{item.path}: line at byte {at}" if start else f"{item.path}:{number}"
                if line is None:
                    make.too_large(place)
                elif kind != ".jsonl":
                    yield make.from_bytes(line, place, strip=True)
                elif not line.isspace():
                    yield make.from_line(line, place)
        finally:
            if not compression or lines.before < stop or stop == END:
                self.close()

    def _json(self, file: Any, make: DocumentMaker) -> Iterator[Document | None]:
        try:
            records = json.loads(file.read().removeprefix(b"\xef\xbb\xbf"))
        except (ValueError, RecursionError) as error:
            make.left_out.bad(make.item.path, f"not JSON: {error}")
            return
        if not isinstance(records, list):
            make.left_out.bad(make.item.path, "a .json file must have a list of records; one record per line is .jsonl")
            return
        for number, record in enumerate(records):
            yield make.from_record(record, f"{make.item.path}[{number}]")

    def _parquet(self, file: Any, make: DocumentMaker, start: int, stop: int) -> Iterator[Document | None]:
        import pyarrow
        from pyarrow import parquet

        try:
            table = parquet.ParquetFile(file, pre_buffer=False)
            columns = columns_of(make.config, table.schema_arrow.names)
            end = 0
            for group in range(table.num_row_groups):
                about = table.metadata.row_group(group)
                first, end = end, end + about.num_rows
                if not start <= (about.column(0).dictionary_page_offset or about.column(0).data_page_offset) < stop:
                    continue
                for batch in table.iter_batches(DATASET_ROWS, [group], columns, use_threads=False):
                    yield from documents_of(batch, make, first)
                    first += len(batch)
        except (pyarrow.ArrowException, ValueError) as error:
            make.left_out.bad(make.item.path, f"unreadable Parquet: {cause_of(error)}")


def documents_of(
    batch: "pyarrow.RecordBatch", make: DocumentMaker, first: int, decode: Callable[[Any], Any] = lambda row: row
) -> Iterator[Document | None]:
    """Yield the documents of rows, of which one may not decode; `first` is the index of the first row."""
    try:
        records = [decode(row) for row in batch.to_pylist()]
    except ValueError as error:
        if len(batch) == 1:
            yield make.left_out.bad(f"{make.item.path}[{first}]", str(error))
            return
        for number in range(len(batch)):
            yield from documents_of(batch.slice(number, 1), make, first + number, decode)
        return
    for number, record in enumerate(records, first):
        yield make.from_record(record, f"{make.item.path}[{number}]")


def columns_of(config: CorpusConfig, names: list[str]) -> list[str]:
    """Return the columns that a document needs; raise `ValueError` if one is missing."""
    keys = {Style.text: [config.text_key], Style.chat: [config.messages_key], Style.alpaca: ["instruction", "output"]}
    wanted = [key.split(".")[0] for key in keys[config.style]]
    if missing := [name for name in wanted if name not in names]:
        raise ValueError(f"no column {missing[0]} among {', '.join(names)}")
    of_style = {Style.chat: ["system", "tools", "functions"], Style.alpaca: ["input", "system", "history"]}
    optional = [*of_style.get(config.style, []), (config.source_key or "").split(".")[0]]
    return list(dict.fromkeys([*wanted, *(name for name in optional if name in names)]))


def dataset_batches(item: Item, config: CorpusConfig) -> "Iterator[pyarrow.RecordBatch]":
    """Yield the rows of a dataset, streamed or not."""
    import pyarrow
    from datasets.exceptions import DatasetsError

    dataset: Any = item.dataset
    try:
        if dataset.column_names:
            dataset = dataset.select_columns(columns_of(config, dataset.column_names))
        for table in dataset.with_format("arrow").iter(DATASET_ROWS):
            yield from table.combine_chunks().to_batches()
    except (OSError, ValueError, pyarrow.ArrowException, DatasetsError) as error:
        raise DataError(f"data.dataset ({item.path}) cannot be read: {cause_of(error)}") from None
