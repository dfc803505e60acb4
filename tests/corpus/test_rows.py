"""Rows of Arrow tables are the records that they hold, whatever their types, in blocks or in parts."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import read as reading
from corpus.config import OnBadRecord, Style
from corpus.inputs import BadRecords, items
from corpus.rows import records, serialized
from corpus.texts import all_documents
from tests.corpora import local
from tests.corpus.test_long import found_in

TEXTS = ["a", " ", "words and words of a text ", "今天", "😀", "\u00a0", "\n", "\ufeff", '"', "\0"]
STRINGS = [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]

text = st.lists(st.sampled_from(TEXTS), max_size=30).map("".join)
row = st.fixed_dictionaries(
    {
        "text": st.one_of(text, st.none()),
        "meta": st.one_of(
            st.none(), st.fixed_dictionaries({"set": st.one_of(st.none(), text), "n": st.integers(0, 9)})
        ),
        "tags": st.one_of(st.none(), st.lists(text, max_size=3)),
    }
)


def table_of(rows: list[dict[str, Any]], kind: pyarrow.DataType) -> pyarrow.Table:
    meta = pyarrow.struct([("set", pyarrow.string()), ("n", pyarrow.int8())])
    columns = {
        "text": pyarrow.array([r["text"] for r in rows], pyarrow.string()).cast(kind),
        "meta": pyarrow.array([r["meta"] for r in rows], meta),
        "tags": pyarrow.array([r["tags"] for r in rows], pyarrow.list_(pyarrow.string())),
    }
    return pyarrow.table(columns)


def write(path: Path, table: pyarrow.Table, **options: Any) -> None:
    pq.write_table(table, path, **options)


@given(
    st.lists(row, min_size=1, max_size=20), st.sampled_from(STRINGS), st.integers(1, 9), st.booleans(),
    st.sampled_from(["text", "meta.set"]), st.sampled_from([20, 60, 200]),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_a_row_read_in_parts_is_what_it_is_read_whole(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    kind: pyarrow.DataType,
    group: int,
    raw: bool,
    key: str,
    size: int,
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    write(folder / "a.parquet", table_of(rows, kind), row_group_size=group)
    config = local(folder, "a.parquet", text_key=key, source_key="meta.set", raw_json=raw, valid_fraction=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("corpus.documents.SOURCE_CHARS", 5)  # a name is no long string, however it is written
        whole = found_in(config)
        written = table_of(rows, kind).to_pylist()
        plain = [r["text"] if key == "text" else (r["meta"] or {}).get("set") for r in written]
        held = [json.dumps(r) for r in written] if raw else plain
        named = [(r["meta"] or {}).get("set") or "" for r in written]
        taken = [t for t, n in zip(held, named, strict=True) if t is not None and t.strip() and len(n) <= 5]
        assert [found[0] for found in whole[0]] == taken
        patch.setattr(reading, "BLOCK_BYTES", size)
        patch.setattr(reading, "TEXT_BYTES", size)
        patch.setattr("corpus.long.LONG_STRING", 24)
        patch.setattr("corpus.long.READ_BYTES", 7)
        patch.setattr("corpus.long.PIECE_CHARS", 9)
        assert found_in(config) == whole


def test_cells_that_hold_json_are_what_is_in_it() -> None:
    """Hugging Face's datasets store what differs in shape from record to record as JSON."""
    parts = [pyarrow.array(["user"]), pyarrow.array(['"hi"'], pyarrow.json_())]
    turn = pyarrow.StructArray.from_arrays(parts, ["role", "content"])
    meta = pyarrow.array(['{"set": "x"}', None, '["y"]'], pyarrow.json_())
    turns = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, None, 1], pyarrow.int32()), turn)
    batch = pyarrow.RecordBatch.from_arrays([meta, turns], ["meta", "turns"])
    assert records(serialized(batch)) == [
        {"meta": {"set": "x"}, "turns": [{"role": "user", "content": "hi"}]},
        {"meta": None, "turns": []},
        {"meta": ["y"], "turns": None},
    ]


def test_what_goes_to_a_worker_is_its_rows_alone() -> None:
    batch = pyarrow.record_batch({"text": ["x" * 1_000_000, "y", "z"]})
    rows = serialized(batch.slice(1, 1))
    assert len(rows) < 2000 and records(rows) == [{"text": "y"}]


def broken_utf8() -> pyarrow.Table:
    raw = pyarrow.array([b"abc", b"d\xff" + b"e" * 900, b"f" * 900, b"g\xff"], pyarrow.binary())
    return pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 4, raw.buffers())})


def test_a_cell_that_is_no_utf8_is_told_and_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.parquet", broken_utf8())
    for size in (1 << 20, 100):
        monkeypatch.setattr(reading, "BLOCK_BYTES", size)
        monkeypatch.setattr(reading, "TEXT_BYTES", size)
        monkeypatch.setattr("corpus.long.LONG_STRING", size)
        bad = BadRecords(OnBadRecord.skip)
        found = [d.text for d in all_documents(local(tmp_path, "a.parquet", valid_fraction=0.0), bad)]
        assert found == ["abc", "f" * 900] and bad.count == 2
        assert bad.places[0].startswith(f"{tmp_path}/a.parquet[1]: not UTF-8 at byte 1")
        assert bad.places[1].startswith(f"{tmp_path}/a.parquet[3]: not UTF-8 at byte 1")


def test_rows_that_are_damaged_are_told_and_the_other_groups_of_rows_are_read(tmp_path: Path) -> None:
    file = io.BytesIO()
    texts = [f"{i} " + "".join(np.random.default_rng(i).choice(list("abcdefgh"), 300)) for i in range(30)]
    pq.write_table(pyarrow.table({"text": texts}), file, row_group_size=10)
    raw = bytearray(file.getvalue())
    start = pq.ParquetFile(io.BytesIO(raw)).metadata.row_group(1).column(0).dictionary_page_offset
    raw[start + 40 : start + 400] = bytes(360)
    (tmp_path / "a.parquet").write_bytes(raw)
    bad = BadRecords(OnBadRecord.skip)
    found = [d.text for d in all_documents(local(tmp_path, "a.parquet", valid_fraction=0.0), bad)]
    assert found == texts[:10] + texts[20:] and bad.count == 1
    assert bad.places[0].startswith(f"{tmp_path}/a.parquet[10]: rows up to 19 are damaged: ")


def test_what_json_cannot_hold_is_a_bad_record_of_raw_json(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", pyarrow.table({"text": ["a", "b"], "raw": [b"x", None]}))
    bad = BadRecords(OnBadRecord.skip)
    found = [d.text for d in all_documents(local(tmp_path, "a.parquet", raw_json=True, valid_fraction=0.0), bad)]
    assert found == ['{"text": "b", "raw": null}']
    assert bad.places == [
        f"{tmp_path}/a.parquet[0]: cannot be written as JSON, as data.raw_json asks: Object of type bytes is not JSON "
        "serializable"
    ]


def test_a_column_that_names_the_source_may_be_missing_as_a_key_may(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", pyarrow.table({"text": ["a"]}))
    (found,) = all_documents(local(tmp_path, "a.parquet", source_key="meta.set"), BadRecords(OnBadRecord.error))
    assert found.source == "mine"


def test_a_long_conversation_of_a_row_is_held_up_to_a_limit(tmp_path: Path) -> None:
    turns = [[{"role": "assistant", "content": "x" * size}] for size in (3, 5_000_000, 3)]
    write(tmp_path / "a.parquet", pyarrow.table({"messages": turns}))
    config = local(tmp_path, "a.parquet", style=Style.chat, max_document_mb=1)
    found, count, _, places = found_in(config)
    assert len(found) == 2 and count == 1
    assert places[0].endswith("a.parquet[1]: a conversation of more than data.max_document_mb (1) MB")
    config.max_document_mb = 32
    assert len(found_in(config)[0]) == 3


def test_a_row_that_is_long_without_its_strings_is_a_bad_record(tmp_path: Path) -> None:
    rows = {"text": ["a", "b" * 5_000_000, "c"], "numbers": [[1], [2], list(range(700_000))]}
    write(tmp_path / "a.parquet", pyarrow.table(rows), row_group_size=1)
    found, count, _, places = found_in(local(tmp_path, "a.parquet", raw_json=True, max_document_mb=1))
    assert [len(text) > 1000 for text, *_ in found] == [False, True] and count == 1
    assert places[0].startswith(f"{tmp_path}/a.parquet[2]: a record of more than data.max_document_mb (1) MB")


def test_conversations_that_are_too_long_together_are_read(tmp_path: Path) -> None:
    turns = [[{"role": "assistant", "content": "x" * 400_000}]] * 4
    write(tmp_path / "a.parquet", pyarrow.table({"messages": turns}))
    found, count, *_ = found_in(local(tmp_path, "a.parquet", style=Style.chat, max_document_mb=1))
    assert len(found) == 4 and not count


def test_a_column_that_refers_to_a_dictionary_is_of_each_row_its_own_text(tmp_path: Path) -> None:
    texts = [*"ab", "c" * 5_000_000, "d", "a"]
    write(tmp_path / "a.parquet", pyarrow.table({"text": pyarrow.array(texts).dictionary_encode()}))
    config = local(tmp_path, "a.parquet", max_document_mb=1, valid_fraction=0.0)
    assert [text for text, *_ in found_in(config)[0]] == texts
    (item,) = items(config, BadRecords(OnBadRecord.error))
    found = reading.blocks(item, config, BadRecords(OnBadRecord.error))
    assert max(len(block.payload) for block in found if block.kind == "rows") < 2000
