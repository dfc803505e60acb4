"""Hugging Face's datasets, from a folder or as they arrive: their rows, their split, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from corpus import read as reading
from corpus.config import DataError, OnBadRecord, Source, SplitBy
from corpus.documents import documents
from corpus.inputs import BadRecords, items
from corpus.texts import all_documents
from data.config import DataConfig
from tests.corpora import RECORDS, lines, local, read


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(lines(RECORDS))
    return local(tmp_path, "none", source=Source.huggingface, dataset=str(tmp_path / "set"), source_key="meta.set")


def test_the_tutorials_dataset_is_split_as_the_tutorial_splits_it(dataset: DataConfig) -> None:
    import datasets

    dataset.split_by = SplitBy.train_test_split
    found = read(dataset)
    split = datasets.Dataset.from_list(RECORDS).train_test_split(test_size=0.2, seed=42)
    for part, rows in (("train", split["train"]), ("valid", split["test"])):
        assert [document.text for document in found if document.split == part] == rows["text"][:]
    assert {document.source for document in found} == {"wikipedia_en", "c++"}
    dataset.max_documents = 7
    assert len(read(dataset)) == 7


def test_any_other_dataset_is_split_by_content_whether_or_not_it_streams_and_when_rows_are_added(
    dataset: DataConfig, tmp_path: Path
) -> None:
    before = {d.text: d.split for d in read(dataset)}
    assert list(before) == [record["text"] for record in RECORDS] and set(before.values()) == {"train", "valid"}
    dataset.streaming = True
    assert {d.text: d.split for d in read(dataset)} == before
    dataset.streaming = False
    (tmp_path / "set" / "train.jsonl").write_bytes(lines([{"text": "new", "meta": {"set": "new"}}, *RECORDS]))
    after = {d.text: d.split for d in read(dataset)}
    assert len(after) == len(before) + 1 and after.items() > before.items()


def test_a_row_of_a_dataset_that_is_too_long_to_hold_comes_in_parts(
    dataset: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "".join(record["text"] for record in RECORDS)
    rows = [*RECORDS[:3], {"text": long, "meta": RECORDS[0]["meta"]}, *RECORDS[3:]]
    (tmp_path / "set" / "train.jsonl").write_bytes(lines(rows))
    monkeypatch.setattr(reading, "BLOCK_BYTES", 300)
    monkeypatch.setattr(reading, "TEXT_BYTES", 300)
    monkeypatch.setattr("corpus.long.LONG_STRING", 100)
    monkeypatch.setattr("corpus.long.PIECE_CHARS", 200)
    for dataset.streaming in (False, True):
        found = read(dataset)
        parts = [d for d in found if d.digest is not None]
        assert len(parts) > 3 and "".join(d.text for d in parts) == long and len({d.split for d in parts}) == 1
        assert parts[0].place.endswith("set[3]") and len(found) == len(RECORDS) + len(parts)


def test_what_differs_in_shape_in_a_dataset_is_what_it_is_in_its_file(dataset: DataConfig, tmp_path: Path) -> None:
    metas: list[Any] = [{"set": "a"}, {"set": "b", "more": [1, {"x": "y"}]}, ["no", "key"], None]
    rows = [{"text": f"text {i}", "meta": meta} for i, meta in enumerate(metas)]
    (tmp_path / "set" / "train.jsonl").write_bytes(lines(rows))
    for dataset.streaming in (False, True):
        assert [d.source for d in read(dataset)] == ["a", "b", "mine", "mine"]
    dataset.raw_json = True
    assert [json.loads(d.text) for d in read(dataset)] == rows


def test_a_dataset_without_the_column_is_refused_at_once(dataset: DataConfig) -> None:
    dataset.text_key, dataset.on_bad_record = "content.plain", OnBadRecord.skip
    with pytest.raises(DataError, match=r"data.dataset \(.*set\) has no column content; it has text, meta"):
        read(dataset)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_is_read_on_from_where_it_was(
    dataset: DataConfig, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setattr(reading, "BLOCK_RECORDS", 7)
    dataset.streaming = streaming
    bad = BadRecords(OnBadRecord.error)
    (item,) = items(dataset, bad)
    later = [d.text for block in reading.blocks(item, dataset, bad, skip=3) for d in documents(block, dataset, bad)]
    assert later == [record["text"] for record in RECORDS[21:]]


def test_what_a_dataset_cannot_be_loaded_for_is_told(dataset: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "set" / "train.jsonl").write_bytes(b'{"text": "x"}\n{"text": 3, broken\n')
    for dataset.streaming in (False, True):
        with pytest.raises(DataError, match=r"^data.dataset \(.*set\) cannot be loaded: Expected .* at position 11$"):
            read(dataset)


def test_a_dataset_that_cannot_be_had_is_a_sentence(tmp_path: Path) -> None:
    config = local(tmp_path, "none", source=Source.huggingface, dataset=str(tmp_path / "nothing"))
    with pytest.raises(DataError, match=r"data.dataset \(.*nothing\) cannot be loaded"):
        list(all_documents(config, BadRecords(OnBadRecord.error)))
