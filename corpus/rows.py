"""Rows of Arrow tables, as Parquet files and datasets hold them: they reach the workers as they lie."""

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow


def plain(batch: "pyarrow.RecordBatch") -> "pyarrow.RecordBatch":
    """Write out columns that refer to a dictionary, which would count, and be copied, whole with each row."""
    import pyarrow

    columns = [c.dictionary_decode() if isinstance(c, pyarrow.DictionaryArray) else c for c in batch.columns]
    return pyarrow.RecordBatch.from_arrays(columns, batch.schema.names)


def serialized(batch: "pyarrow.RecordBatch") -> bytes:
    """Give rows as an Arrow stream, without what else is in their buffers."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue().to_pybytes()


def records(stream: bytes) -> list[Any]:
    """Give what rows hold; for one that holds no UTF-8, or no JSON where its type says so, the `ValueError`."""
    import pyarrow

    table = pyarrow.ipc.open_stream(stream).read_all()
    try:
        return _records(table)
    except ValueError:
        return [_record_or_error(table.slice(row, 1)) for row in range(len(table))]


def _record_or_error(row: "pyarrow.Table") -> Any:
    try:
        return _records(row)[0]
    except ValueError as error:
        return error


def _records(table: "pyarrow.Table") -> list[Any]:
    found = table.to_pylist()
    for name in [field.name for field in table.schema if _holds_json(field.type)]:
        for record in found:
            record[name] = _parsed(record[name], table.schema.field(name).type)
    return found


def _holds_json(kind: "pyarrow.DataType") -> bool:
    import pyarrow

    parts = (kind.field(i).type for i in range(kind.num_fields))
    return isinstance(kind, pyarrow.JsonType) or any(map(_holds_json, parts))


def _parsed(value: Any, kind: "pyarrow.DataType") -> Any:
    """Give a value with the JSON in it parsed: what Hugging Face's datasets store where records differ in shape."""
    import pyarrow

    match value:
        case str() if isinstance(kind, pyarrow.JsonType):
            return json.loads(value)
        case dict():
            return {name: _parsed(part, kind.field(name).type) for name, part in value.items()}
        case list():
            return [_parsed(part, kind.field(0).type) for part in value]
    return value


def fields(cell: "pyarrow.Array") -> "dict[str, pyarrow.Array] | None":
    """Give the parts of a cell, an array of one, that is a structure; None for any other."""
    import pyarrow

    if not isinstance(cell, pyarrow.StructArray) or cell.null_count:
        return None
    return {cell.type.field(i).name: cell.field(i) for i in range(cell.type.num_fields)}


def leaves(cells: "Iterable[pyarrow.Array]") -> "Iterator[pyarrow.Array]":
    """Yield the cells that some are made of, structures taken apart."""
    for cell in cells:
        inside = fields(cell)
        yield from [cell] if inside is None else leaves(inside.values())


def characters(cell: "pyarrow.Array") -> "pyarrow.Buffer | None":
    """Give the UTF-8 of a cell that is a string, which Arrow's scalars would copy; None for any other."""
    import pyarrow

    if cell.null_count or not isinstance(cell, pyarrow.StringArray | pyarrow.LargeStringArray):
        return None
    _, offsets, data = cell.buffers()
    kind = np.dtype("<i4" if isinstance(cell, pyarrow.StringArray) else "<i8")
    start, stop = np.frombuffer(offsets, kind, 2, cell.offset * kind.itemsize).tolist()
    return data[start:stop]


def value(cell: "pyarrow.Array") -> Any:
    """Give what a cell holds, the JSON in it parsed."""
    return _parsed(cell[0].as_py(), cell.type)
