"""From files to a corpus: what is read, what is refused, and what is never lost."""

import dataclasses
import gzip
import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import zstandard

from data import prepare as module
from data.builtin import builtin_documents
from data.config import DataConfig, DataError, OnBadRecord, Source, TokenizerConfig
from data.corpus import open_corpus
from data.prepare import existing, held_out, prepare
from data.read import BadRecords, Document, local_documents, source_name
from data.shards import Shard
from data.tokenizer import Tokenizer

RECORDS = [
    {"text": f"Document {i}: {'word ' * (i % 7)}\n", "meta": {"set": "Wikipedia (en)" if i % 3 else "C++"}}
    for i in range(60)
]


def local(tmp_path: Path, pattern: str, **changes: object) -> DataConfig:
    config = DataConfig(
        name="mine", path=str(tmp_path / "corpora" / "mine"), source=Source.local, input=str(tmp_path / pattern),
        valid_fraction=0.2, seq_len=8, micro_batch_size=1, workers=0,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def lines(records: list[dict]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def read(config: DataConfig) -> list[Document]:
    return list(local_documents(config, BadRecords(config.on_bad_record)))


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    raw = lines(RECORDS)
    files = {
        "a.jsonl": raw, "a.jsonl.gz": gzip.compress(raw), "a.jsonl.zst": zstandard.compress(raw),
        "a.json": json.dumps(RECORDS).encode(), "a.json.gz": gzip.compress(json.dumps(RECORDS).encode()),
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert [d.text for d in read(local(tmp_path, name))] == [record["text"] for record in RECORDS], name
    (tmp_path / "a.txt").write_text("one\n\n  two\n", encoding="utf-8")
    assert [d.text for d in read(local(tmp_path, "a.txt"))] == ["one\n\n  two\n"]
    assert [d.text for d in read(local(tmp_path, "a.txt", text_lines=True))] == ["one", "two"]
    assert [d.text for d in read(local(tmp_path, "a.jsonl", raw_json=True))] == raw.decode().splitlines(keepends=True)


def test_sources_are_folders_or_a_key(tmp_path: Path) -> None:
    for folder in ("en", "code/deep"):
        (tmp_path / "texts" / folder).mkdir(parents=True)
        (tmp_path / "texts" / folder / "a.jsonl").write_bytes(lines(RECORDS[:3]))
    for pattern in ("texts", "texts/**/*.jsonl"):
        assert {d.source for d in read(local(tmp_path, pattern))} == {"en", "code"}
    assert {d.source for d in read(local(tmp_path, "texts", source_key="meta.set"))} == {
        "wikipedia_en",
        "c++",
    }
    assert source_name("../x") == "x" and source_name("???") == "unnamed"


BAD = [
    ("a.jsonl", b'{"text": "fine"}\n{"text": \n', r"a.jsonl:2: not JSON"),
    ("a.jsonl", b'{"text": "\xff"}\n', r"a.jsonl:1: not UTF-8 at byte 10"),
    ("a.jsonl", b'{"body": "x"}\n', r"a.jsonl:1: data.text_key \(text\) is no string in it; it has body"),
    ("a.jsonl", b'{"text": 3}\n', r"is no string"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', r"half a surrogate pair"),
    ("a.jsonl", b"", r"a.jsonl: holds no document"),
    ("a.json", b'{"text": "x"}', r"must hold a list of records"),
    ("a.jsonl.gz", gzip.compress(lines(RECORDS))[:-20], r"damaged or cut short"),
    ("a.jsonl.zst", b"not zstandard", r"damaged or cut short"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), BAD, ids=range(len(BAD)))
def test_a_bad_record_is_named_or_counted(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read(local(tmp_path, name))
    bad = BadRecords(OnBadRecord.skip)
    list(local_documents(local(tmp_path, name, on_bad_record=OnBadRecord.skip), bad))
    assert bad.count >= 1 and len(bad.places) == min(bad.count, 10)


def test_no_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"names no file that can be read: it takes .txt, .json, .jsonl"):
        read(local(tmp_path, "*.jsonl"))


@pytest.fixture
def config(tmp_path: Path) -> Iterator[DataConfig]:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(RECORDS))
    yield local(tmp_path, "texts", source_key="meta.set")


def made(config: DataConfig, tokenizer: Tokenizer, workers: int = 1, **changes: object) -> dict:
    settings = TokenizerConfig(model=str(tokenizer.path), vocab_size=1200, **changes)  # type: ignore[arg-type]
    return prepare(config, settings, workers=workers, on_progress=lambda counts: None)[0]


def test_a_corpus_holds_every_document_whole(config: DataConfig, tokenizer: Tokenizer) -> None:
    about = made(config, tokenizer)
    decoded = []
    for split, sources in about["splits"].items():
        for name, counts in sources.items():
            shard = Shard(Path(config.path) / split / name, verify=True)
            assert counts["documents"] == shard.header.documents
            for i in range(shard.header.documents):
                ids = shard.document(i).tolist()
                assert ids[-1] == tokenizer.eos_id
                decoded.append(tokenizer.decode(ids[:-1]))
                assert held_out(Document(decoded[-1], "", ""), config) is (split == "valid")
    assert sorted(decoded) == sorted(record["text"] for record in RECORDS)
    corpus = open_corpus(config, vocab_size=1280)
    assert corpus.sources == ("c++", "wikipedia_en") and corpus.train.n_packs > 0 and corpus.valid.n_packs > 0
    assert corpus.bytes_per_token is not None and len(corpus.bytes_per_token) == 1280


def test_the_result_does_not_depend_on_the_workers(
    config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_CHARS", 100)
    made(config, tokenizer, workers=1)
    other = dataclasses.replace(config, path=config.path + "2")
    made(other, tokenizer, workers=3)
    for path in sorted(Path(config.path).rglob("*.bin")):
        assert path.read_bytes() == (Path(other.path) / path.relative_to(config.path)).read_bytes()


def test_the_same_corpus_is_used_again_and_another_is_not_overwritten(config: DataConfig, tokenizer: Tokenizer) -> None:
    settings = TokenizerConfig(model=str(tokenizer.path), vocab_size=1200)
    assert not existing(config, settings)
    made(config, tokenizer)
    assert existing(dataclasses.replace(config, seq_len=64, workers=7), settings)
    with pytest.raises(DataError, match=r"was made with other settings: data.text_key \(text, now body\)"):
        existing(dataclasses.replace(config, text_key="body"), settings)
    with pytest.raises(DataError, match=r"tokenizer.add_bos \(False, now True\)"):
        existing(config, dataclasses.replace(settings, add_bos=True))


def test_a_failure_leaves_nothing_that_looks_like_a_corpus(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "texts" / "b.jsonl").write_bytes(b"{")
    with pytest.raises(DataError, match="b.jsonl:1"):
        made(config, tokenizer)
    assert not Path(config.path).exists() and not list((tmp_path / "corpora").glob(".*partial"))
    (tmp_path / "texts" / "b.jsonl").unlink()
    leftover = tmp_path / "corpora" / ".mine.partial"
    (leftover / "train").mkdir(parents=True)
    (leftover / "train" / "old.bin").write_bytes(b"x")
    made(config, tokenizer)
    assert not list(Path(config.path).rglob("old.bin"))


def test_a_full_disk_leaves_nothing(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data.shards.ShardWriter.close", full)
    with pytest.raises(OSError, match="No space left"):
        made(config, tokenizer)
    assert [path.name for path in (tmp_path / "corpora").iterdir()] == [".mine.lock"]


def test_a_tokenizer_without_the_asked_for_token_is_refused(
    config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.prepare.load_tokenizer", lambda path: _without_eos(tokenizer))
    with pytest.raises(DataError, match=r"tokenizer.add_eos \(true\): .* has no such token"):
        made(config, tokenizer)


def _without_eos(tokenizer: Tokenizer) -> Tokenizer:
    other = type(tokenizer)(tokenizer.path)  # type: ignore[call-arg]
    other.eos_id = None
    return other


def tampered(config: DataConfig, change: str) -> None:
    folder = Path(config.path)
    match change:
        case "tokenizer":
            path = folder / "tokenizer" / "tokenizer.model"
            path.write_bytes(path.read_bytes() + b"\xc0\x3e\x01")
        case "corpus.json":
            (folder / "corpus.json").write_text("{}")
        case "bin":
            path = next((folder / "train").glob("*.bin"))
            path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("change", "vocab_size", "sentence"),
    [
        ("none", 1199, r"has 1200 pieces, more than model.vocab_size \(1199\); pass model.vocab_size=1280"),
        ("tokenizer", 1200, "is not the tokenizer that .* was made with"),
        ("corpus.json", 1200, "does not describe a corpus"),
        ("bin", 1200, "it was cut short or changed"),
    ],
)
def test_an_unfit_corpus_is_told_when_opened(
    config: DataConfig, tokenizer: Tokenizer, change: str, vocab_size: int, sentence: str
) -> None:
    made(config, tokenizer)
    tampered(config, change)
    with pytest.raises(DataError, match=sentence):
        open_corpus(config, vocab_size=vocab_size)


def test_missing_and_too_little_data_are_told(config: DataConfig, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="run: python prepare_data.py data=mine"):
        open_corpus(config, vocab_size=1200)
    made(config, tokenizer)
    with pytest.raises(DataError, match=r"none of its sources fills one pack of 100000"):
        open_corpus(dataclasses.replace(config, seq_len=100_000), vocab_size=1200)


def test_a_changed_corpus_has_another_fingerprint(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    made(config, tokenizer)
    before = open_corpus(config, vocab_size=1200).fingerprint
    assert open_corpus(config, vocab_size=1200).fingerprint == before
    shutil.rmtree(config.path)
    (tmp_path / "texts" / "b.jsonl").write_bytes(lines([{"text": "more text"}]))
    made(config, tokenizer)
    assert open_corpus(config, vocab_size=1200).fingerprint != before


def test_the_builtin_text_is_the_same_each_time_and_keeps_files_together() -> None:
    documents = list(builtin_documents())
    assert {document.source for document in documents} == {"code", "en"}
    assert sum(len(document.text) for document in documents) > 5e6
    assert [d.place for d in documents[:300]] == [d.place for d in islice(builtin_documents(), 300)]
    docstring = next(d for d in documents if d.source == "en" and d.place.startswith("argparse.py"))
    source = next(d for d in documents if d.source == "code" and d.place == "argparse.py")
    assert docstring.key == source.key


def test_a_long_document_takes_memory_in_proportion(tokenizer: Tokenizer) -> None:
    import tracemalloc

    from data.tokenizer import encode_document

    text = ("a line of some words, again and again\n" * 10_000) * 8  # 3 MB
    tracemalloc.start()
    ids = encode_document(tokenizer, text, add_bos=False, add_eos=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(ids) > 400_000
    assert peak < 4 * ids.nbytes + 20 * 2**20
    assert np.array_equal(ids[:1000], encode_document(tokenizer, text[:8000], add_bos=False, add_eos=False)[:1000])


def test_a_hugging_face_dataset_is_split_as_the_tutorial_splits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(lines(RECORDS))
    config = local(tmp_path, "none", source=Source.huggingface, dataset=str(tmp_path / "set"), source_key="meta.set")
    found = list(module.documents(config, BadRecords(OnBadRecord.error)))
    split = datasets.Dataset.from_list(RECORDS).train_test_split(test_size=0.2, seed=42)
    for part, rows in (("train", split["train"]), ("valid", split["test"])):
        assert [document.text for document in found if document.split == part] == rows["text"][:]
    assert {document.source for document in found} == {"wikipedia_en", "c++"}
    assert len(list(module.documents(dataclasses.replace(config, max_documents=7), BadRecords(OnBadRecord.error)))) == 7


def test_a_dataset_that_cannot_be_had_is_a_sentence(tmp_path: Path) -> None:
    config = local(tmp_path, "none", source=Source.huggingface, dataset=str(tmp_path / "nothing"))
    with pytest.raises(DataError, match=r"data.dataset \(.*nothing\) cannot be loaded"):
        list(module.documents(config, BadRecords(OnBadRecord.error)))
