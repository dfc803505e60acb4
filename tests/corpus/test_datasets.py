"""Hugging Face's datasets, from a folder or streamed: their rows, their splits, their units."""

from pathlib import Path
from typing import Any

import pyarrow
import pytest

from corpus import readers
from corpus.config import DataError, OnBadRecord, Source, SplitBy
from corpus.documents import LeftOut
from corpus.inputs import list_items
from corpus.units import plan_units
from data.config import DataConfig
from data.tokenizer import Tokenizer
from tests.corpora import RECORDS, contents, lines, local, made, n_documents, not_utf8, read, texts


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(readers, "DATASET_ROWS", 7)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(lines(RECORDS))
    return local(tmp_path, "none", source=Source.huggingface, dataset=str(tmp_path / "set"), source_key="meta.set")


def test_train_test_split_is_the_tutorials(dataset: DataConfig, tokenizer: Tokenizer, small_units: None) -> None:
    import datasets

    dataset.split_by = SplitBy.train_test_split
    found = read(dataset)
    split = datasets.Dataset.from_list(RECORDS).train_test_split(test_size=0.2, seed=42)
    for part, rows in (("train", split["train"]), ("valid", split["test"])):
        assert [document.text for document in found if document.split == part] == rows["text"][:]
    about = made(dataset, tokenizer)
    assert (n_documents(about, "train"), n_documents(about, "valid")) == (48, 12)


def test_split_by_hash_is_that_of_any_text(dataset: DataConfig, tmp_path: Path) -> None:
    before = {d.text: d.split for d in read(dataset)}
    assert list(before) == [record["text"] for record in RECORDS] and set(before.values()) == {"train", "valid"}
    dataset.streaming = True
    assert {d.text: d.split for d in read(dataset)} == before
    dataset.streaming = False
    (tmp_path / "set" / "train.jsonl").write_bytes(lines([{"text": "new", "meta": {"set": "new"}}, *RECORDS]))
    after = {d.text: d.split for d in read(dataset)}
    assert len(after) == len(before) + 1 and after.items() > before.items()


def test_streaming_and_workers_make_the_same_corpus(
    dataset: DataConfig, tokenizer: Tokenizer, small_units: None
) -> None:
    assert len(list(plan_units(list_items(dataset), dataset))) > 4
    found = []
    for dataset.streaming, workers in ((False, 1), (True, 2)):
        dataset.path = f"{dataset.path}+"
        made(dataset, tokenizer, workers)
        found.append(contents(dataset.path))
    assert all(each == found[0] for each in found)


def test_rows_of_several_shapes(dataset: DataConfig, tmp_path: Path) -> None:
    metas: list[Any] = [{"set": "a"}, {"set": "b", "more": [1, {"x": "y"}]}, ["no", "key"], None]
    rows = [{"text": f"text {i}", "meta": meta} for i, meta in enumerate(metas)]
    (tmp_path / "set" / "train.jsonl").write_bytes(lines(rows))
    for dataset.streaming in (False, True):
        assert [d.source for d in read(dataset)] == ["a", "b", "mine", "mine"]


def test_bad_row_is_named(dataset: DataConfig, tokenizer: Tokenizer, tmp_path: Path, small_units: None) -> None:
    import datasets
    from datasets.table import InMemoryTable

    rows = [*RECORDS[:30], {"text": None, "meta": {"set": "x"}}, *RECORDS[30:]]
    (tmp_path / "set" / "train.jsonl").write_bytes(lines(rows))
    dataset.on_bad_record = OnBadRecord.skip
    about = made(dataset, tokenizer)
    assert about["left_out"]["count"] == 1 and about["left_out"]["places"][0].startswith(f"{tmp_path}/set[30]: ")
    table = pyarrow.table({"text": not_utf8([b"one", b"\xff", b"three"])})
    datasets.Dataset(InMemoryTable(table)).save_to_disk(tmp_path / "saved")
    left_out = LeftOut(OnBadRecord.skip)
    dataset.dataset = str(tmp_path / "saved")
    assert texts(dataset, left_out) == ["one", "three"]
    assert left_out.places[0].startswith(f"{tmp_path}/saved[1]: ")
    with pytest.raises(DataError, match=r"data.input .* was made by save_to_disk; read it with data=huggingface"):
        read(local(tmp_path, "saved"))


def test_dataset_that_cannot_be_loaded(dataset: DataConfig, tmp_path: Path) -> None:
    dataset.streaming, dataset.text_key = True, "content.plain"
    with pytest.raises(DataError, match=r"data.dataset \(.*set\) .*column content"):
        read(dataset)
    (tmp_path / "set" / "train.jsonl").write_bytes(b'{"text": "x"}\n{"text": 3, broken\n')
    for name in ("set", "nothing"):
        dataset.dataset = str(tmp_path / name)
        with pytest.raises(DataError, match=rf"data.dataset \(.*{name}\) cannot be loaded"):
            read(dataset)


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_split_of_a_dataset(dataset: DataConfig, tmp_path: Path, streaming: bool) -> None:
    import datasets

    (tmp_path / "set" / "validation.jsonl").write_bytes(lines([{"text": "held out"}, {"text": "too"}]))
    parts: Any = {"train": RECORDS, "validation": [{"text": "mine"}]}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    saved.save_to_disk(tmp_path / "saved [1]")
    dataset.streaming = streaming
    for folder, expected in (("set", ["held out", "too"]), ("saved [1]", ["mine"])):
        dataset.dataset, dataset.dataset_valid_split = str(tmp_path / folder), "validation"
        found = read(dataset)
        assert [d.text for d in found if d.split == "valid"] == expected
        assert [d.text for d in found if d.split == "train"] == [record["text"] for record in RECORDS]
        dataset.dataset_valid_split = None
        assert {d.split for d in read(dataset)} == {"train", "valid"}
    dataset.dataset_valid_split = "dev"
    with pytest.raises(DataError, match="no split dev, but train, validation"):
        read(dataset)
