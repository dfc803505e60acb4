"""Training and validation have no document in common, also when files are added to a corpus."""

import dataclasses
from pathlib import Path

import pytest

from corpus import inputs
from corpus import read as reading
from corpus.config import DataError, OnBadRecord, TokenizerConfig
from corpus.inputs import BadRecords, items
from corpus.prepare import existing
from data.config import DataConfig
from data.dataset import open_corpus
from data.tokenizer import Tokenizer
from tests.corpora import RECORDS, contents, lines, local, made


def test_files_that_came_since_are_added_when_asked_and_the_rest_is_not_touched(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    made(config, tokenizer)
    before = contents(config.path)
    settings = TokenizerConfig(model=str(tokenizer.path), vocab_size=1200)
    (tmp_path / "texts" / "b.jsonl").write_bytes(
        lines([{"text": f"new {i}", "meta": {"set": "new"}} for i in range(30)])
    )
    with pytest.raises(
        DataError, match=r"1 files of data.input came after .* b.jsonl first; pass add=true|b.jsonl first"
    ):
        existing(config, settings)
    assert not existing(config, settings, add=True)
    parts = open_corpus(config, vocab_size=1200).fingerprints
    about = made(config, tokenizer, add=True)
    assert existing(config, settings) and about["splits"]["train"]["new"]["documents"] > 10
    after = contents(config.path)
    assert all(after[name] == content for name, content in before.items() if name != "corpus.json")
    corpus = open_corpus(config, vocab_size=1200)
    assert set(parts) < set(corpus.fingerprints) and "new" in corpus.sources
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(RECORDS[1:]))
    with pytest.raises(DataError, match=r"a.jsonl has \d+ bytes and had \d+ when"):
        existing(config, settings)


def test_what_is_held_out_whole_is_not_trained_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(RECORDS))
    (tmp_path / "held.jsonl").write_bytes(lines([{"text": "only held out"}, RECORDS[7]]))
    config = local(tmp_path, "texts", valid_input=str(tmp_path / "held.jsonl"))
    with pytest.raises(DataError, match=r"a.jsonl:8: is in the validation split as well"):
        made(config, tokenizer)
    about = made(dataclasses.replace(config, on_bad_record=OnBadRecord.skip), tokenizer)
    assert about["splits"]["train"]["mine"]["documents"] == len(RECORDS) - 1
    assert about["splits"]["valid"]["mine"]["documents"] == 2


def test_a_long_document_that_is_held_out_is_not_trained_on(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "TEXT_BYTES", 300)
    monkeypatch.setattr("corpus.long.PIECE_CHARS", 200)
    long = "".join(record["text"] for record in RECORDS)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines([{"text": "x"}, {"text": long}, {"text": "y"}]))
    (tmp_path / "held.jsonl").write_bytes(lines([{"text": long}]))
    config = local(tmp_path, "texts", valid_input=str(tmp_path / "held.jsonl"))
    with pytest.raises(DataError, match=r"a.jsonl:2: is in the validation split as well"):
        made(config, tokenizer)
    about = made(dataclasses.replace(config, on_bad_record=OnBadRecord.skip), tokenizer)
    assert about["splits"]["train"]["mine"]["documents"] == 2 and about["splits"]["valid"]["mine"]["documents"] == 1


def test_files_are_known_again_from_another_working_directory(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TokenizerConfig(model=str(tokenizer.path), vocab_size=1200)
    monkeypatch.chdir(tmp_path)
    made(dataclasses.replace(config, input="texts"), tokenizer)
    monkeypatch.chdir("/")
    assert existing(config, settings) and existing(config, settings, add=True)


@pytest.mark.parametrize("policy", OnBadRecord)
def test_a_copy_of_a_file_that_is_in_the_corpus_is_not_added_whatever_its_name(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, policy: OnBadRecord
) -> None:
    config.on_bad_record = policy
    made(config, tokenizer)
    (tmp_path / "texts" / "0.jsonl").write_bytes((tmp_path / "texts" / "a.jsonl").read_bytes())
    (tmp_path / "texts" / "1.jsonl").write_bytes(lines([{"text": f"new {i}"} for i in range(30)]))
    if policy is OnBadRecord.error:
        with pytest.raises(DataError, match=r"0.jsonl: has the same bytes as .*a.jsonl"):
            made(config, tokenizer, add=True)
        return
    about = made(config, tokenizer, add=True)
    documents = sum(source["documents"] for split in about["splits"].values() for source in split.values())
    assert documents == len(RECORDS) + 30
    assert about["left_out"]["count"] == 1 and "0.jsonl: has the same bytes as" in about["left_out"]["places"][0]


def test_a_copy_that_is_the_only_new_file_is_told(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(config, tokenizer)
    settings = TokenizerConfig(model=str(tokenizer.path), vocab_size=1200)
    (tmp_path / "texts" / "0.jsonl").write_bytes((tmp_path / "texts" / "a.jsonl").read_bytes())
    (tmp_path / "texts" / "b.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"0.jsonl: has the same bytes as .*a.jsonl; mend it"):
        existing(config, settings, add=True)
    config.on_bad_record = OnBadRecord.skip
    capsys.readouterr()
    assert existing(config, settings, add=True)
    copy, passed_over = capsys.readouterr().out.splitlines()
    assert copy.endswith(f"0.jsonl: has the same bytes as {tmp_path}/texts/a.jsonl; it was left out")
    assert passed_over == "1 file was passed over: 1 .csv"


def test_what_is_held_out_neither_grows_nor_goes(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "v.jsonl").write_bytes(lines([{"text": "held out"}]))
    (tmp_path / "held" / "w.jsonl").write_bytes(lines([{"text": "held out too"}]))
    config.valid_input = str(tmp_path / "held")
    made(config, tokenizer)
    (tmp_path / "held" / "x.jsonl").write_bytes(lines(RECORDS[:5]))
    with pytest.raises(DataError, match=r"held/x.jsonl came to data.valid_input after .* may have been trained on"):
        made(config, tokenizer, add=True)
    (tmp_path / "held" / "x.jsonl").unlink()
    (tmp_path / "held" / "w.jsonl").unlink()
    assert existing(config, TokenizerConfig(model=str(tokenizer.path), vocab_size=1200))
    (tmp_path / "texts" / "b.jsonl").write_bytes(lines([{"text": "held out too"}]))
    with pytest.raises(DataError, match=r"held/w.jsonl is held out from .* and is not there any more"):
        made(config, tokenizer, add=True)


def test_a_file_that_is_held_out_and_trained_on_is_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / f"{name}.jsonl").write_bytes(lines([{"text": f"{name} {i}"} for i in range(9)]))
    config = local(tmp_path, "texts", valid_input=str(tmp_path / "texts" / "b.jsonl"))
    with pytest.raises(DataError, match=r"texts/b.jsonl: is in data.valid_input as well"):
        made(config, tokenizer)
    about = made(dataclasses.replace(config, on_bad_record=OnBadRecord.skip), tokenizer)
    assert {split: sources["mine"]["documents"] for split, sources in about["splits"].items()} == {
        "train": 9,
        "valid": 9,
    }


def test_files_of_one_size_are_read_once_to_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(20):
        (tmp_path / f"{i:02d}.jsonl").write_bytes(
            lines([{"text": f"{i:02d}" if i % 2 else "same " * 2000 + f"{i:02d}"}])
        )
    (tmp_path / "20.jsonl").write_bytes((tmp_path / "18.jsonl").read_bytes())
    read: list[str] = []
    digest = inputs._digest
    monkeypatch.setattr(inputs, "_digest", lambda item: (read.append(item.path), digest(item))[1])
    bad = BadRecords(OnBadRecord.skip)
    assert len(items(local(tmp_path, "*.jsonl"), bad)) == 20
    assert bad.places == [f"{tmp_path}/20.jsonl: has the same bytes as {tmp_path}/18.jsonl"]
    assert sorted(read) == sorted(f"{tmp_path}/{i:02d}.jsonl" for i in range(0, 21, 2)), "others begin differently"
