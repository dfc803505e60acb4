"""Tokens of Megatron-LM and InternLM are read as those programs write them, and Megatron-LM can read ours."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corpus.config import DataError, Source
from data.config import DataConfig
from data.dataset import Corpus, open_corpus
from data.shards import Shard
from data.tokenizer import Tokenizer
from tests.data.conftest import data_config, write_shard

DOCUMENTS = [[5, 6, 7, 2], [], [8, 2], [103_000, 9, 10, 11, 12, 2]]


def write_megatron(stem: Path, documents: list[list[int]], code: int, dtype: str, *, sequences: int = 1) -> None:
    """Write what `IndexedDatasetBuilder` writes: each document `sequences` sequences, then `end_document()`."""
    parts = [np.array_split(np.array(document, dtype=dtype), sequences) for document in documents]
    lengths = [len(part) for its in parts for part in its]
    itemsize = np.dtype(dtype).itemsize
    starts = [itemsize * sum(lengths[:i]) for i in range(len(lengths))]
    ends = [0, *np.cumsum([len(its) for its in parts]).tolist()]
    Path(f"{stem}.bin").write_bytes(b"".join(part.tobytes() for its in parts for part in its))
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(ends))
    arrays = np.array(lengths, dtype=np.int32), np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64)
    Path(f"{stem}.idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))


def write_internlm(path: Path, documents: list[list[int]], dtype: Any) -> None:
    """Write what InternLM's tools write: `write_bin` line by line, and `np.save` of their offsets and lengths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta, at = [], 0
    with path.open("wb") as file:
        for document in documents:
            line = (json.dumps({"tokens": document}) + "\n").encode()
            file.write(line)
            meta.append((at, len(document)))
            at += len(line)
    with open(f"{path}.meta", "wb") as file:
        np.save(file, np.array(meta, dtype=dtype))


def config(folder: Path, **changes: Any) -> DataConfig:
    return data_config(**{"source": Source.tokens, "input": str(folder), "seq_len": 4} | changes)


def tokens_and_labels(corpus: Corpus) -> list[tuple[list[int], list[int]]]:
    batches = [corpus.train.batch(np.array([pack])) for pack in range(corpus.train.n_packs)]
    return [(b.tokens_BT[0].tolist(), b.labels_BT[0].tolist()) for b in batches]


@pytest.mark.parametrize(("code", "dtype"), [(4, "<i4"), (5, "<i8"), (8, "<u2")])
@pytest.mark.parametrize("sequences", [1, 3])
def test_megatron_files_are_read_in_every_type(tmp_path: Path, code: int, dtype: str, sequences: int) -> None:
    largest = min(np.iinfo(dtype).max, 103_000)
    documents = [[min(token, largest) for token in document] for document in DOCUMENTS] * 60
    write_megatron(tmp_path / "a", documents, code, dtype, sequences=sequences)
    shard = Shard(tmp_path / "a", verify=True)
    assert shard.n_documents == len(documents) and not shard.masked
    assert [shard.document(i).tolist() for i in range(shard.n_documents)] == documents
    ends, _ = shard.ends_between(np.array([0]), np.array([shard.n_tokens]))
    assert ends.tolist() == np.unique(np.cumsum([len(d) for d in documents])).tolist()


def test_folder_of_megatron_files_is_a_corpus(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for source in ("en", "code"):
        (tmp_path / source).mkdir()
        write_megatron(tmp_path / source / "a", DOCUMENTS, 4, "<i4")
    with open(tmp_path / "en" / "a.idx", "ab") as file:  # of multimodal data, a byte per sequence
        file.write(bytes(len(DOCUMENTS)))
    corpus = open_corpus(config(tmp_path, tokenizer=str(tokenizer.path)), vocab_size=103_168)
    assert corpus.sources == ("code", "en")
    assert corpus.bytes_per_token is not None and len(corpus.bytes_per_token) == 103_168
    assert tokens_and_labels(corpus)[:3] == [
        ([5, 6, 7, 2], [6, 7, 2, -100]),
        ([8, 2, 103_000, 9], [2, -100, 9, 10]),
        ([10, 11, 12, 2], [11, 12, 2, -100]),
    ]


def test_links_and_lists_of_folders(tmp_path: Path) -> None:
    for folder in ("one/en", "elsewhere", "two [1]"):
        (tmp_path / folder).mkdir(parents=True)
        write_megatron(tmp_path / folder / "a", DOCUMENTS, 4, "<i4")
    (tmp_path / "one" / "code").symlink_to("../elsewhere")
    (tmp_path / "one" / "back").symlink_to(".")
    settings = config(tmp_path, input=[str(tmp_path / "one"), str(tmp_path / "two [1]" / "a.bin")])
    corpus = open_corpus(settings, vocab_size=103_168)
    assert corpus.sources == ("code", "en", settings.name) and len(corpus.train.files) == 3
    with pytest.raises(DataError, match=r"data.input \(.*gone\)"):
        open_corpus(config(tmp_path, input=[str(tmp_path / "one"), str(tmp_path / "gone")]), vocab_size=103_168)


@pytest.mark.parametrize(("vocab_size", "code"), [(1000, 8), (103_168, 4)])
def test_megatron_reads_our_shards(tmp_path: Path, vocab_size: int, code: int) -> None:
    documents = [[token % vocab_size for token in document] for document in DOCUMENTS]
    write_shard(tmp_path / "a", documents, vocab_size=vocab_size)
    write_megatron(tmp_path / "theirs", documents, code, "<i4" if code == 4 else "<u2")
    for name in ("bin", "idx"):
        assert (tmp_path / f"a.{name}").read_bytes() == (tmp_path / f"theirs.{name}").read_bytes()


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_folder_of_internlm_files_is_a_corpus(tmp_path: Path, dtype: Any) -> None:
    write_internlm(tmp_path / "train" / "cn" / "deep" / "a.bin", [[1, -6, -7, 8, 9], [1, 3]], dtype)
    write_internlm(tmp_path / "train" / "en" / "b.bin", [[1, 5, 6, 7]], dtype)
    write_internlm(tmp_path / "valid" / "en" / "b.bin", [[1, 5, 7, 7]], dtype)
    valid = str(tmp_path / "valid")
    corpus = open_corpus(config(tmp_path / "train", valid_input=valid), vocab_size=10)
    assert corpus.sources == ("cn", "en") and corpus.valid.n_packs == 1
    assert tokens_and_labels(corpus) == [
        ([1, 6, 7, 8], [-100, -100, 8, 9]),  # negative tokens are no targets
        ([9, 1, 3, 0], [-100, 3, -100, -100]),
        ([1, 5, 6, 7], [5, 6, 7, -100]),
    ]
    ordered = config(tmp_path / "train", packing="internlm", seq_len=2)
    assert open_corpus(ordered, vocab_size=10).train.n_packs == 3 + 2


def rewrite_meta(folder: Path, rows: Any) -> None:
    with open(folder / "a.bin.meta", "wb") as file:
        np.save(file, rows, allow_pickle=True)


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no index": ("a.bin", lambda d: (d / "a.bin.meta").unlink()),
    "index no array": ("a.bin.meta", lambda d: (d / "a.bin.meta").write_bytes(b"no array")),
    "one column": ("a.bin.meta", lambda d: rewrite_meta(d, np.zeros(2, dtype=np.int64))),
    "past the end": ("a.bin.meta", lambda d: rewrite_meta(d, np.array([[0, 3], [999, 2]]))),
    "wrapped at 2 GiB": ("a.bin.meta", lambda d: rewrite_meta(d, np.array([[0, 3], [-2147483600, 2]], dtype=np.int32))),
    "another count": ("a.bin: document 0", lambda d: rewrite_meta(d, np.array([[0, 4], [23, 2]]))),
    "bin cut short": ("a.bin: document 1", lambda d: (d / "a.bin").write_bytes((d / "a.bin").read_bytes()[:-4])),
    "id over 31 bits": ("a.bin: document 0", lambda d: write_internlm(d / "a.bin", [[1, 2, 5 + (1 << 32)]], np.int64)),
    "no line of tokens": ("a.bin: document 0", lambda d: (d / "a.bin").write_bytes(b"x" * 39)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_internlm_file_is_named(tmp_path: Path, damage: str) -> None:
    """Case 46."""
    write_internlm(tmp_path / "a.bin", [[1, 2, 33], [1, 22]], np.int64)
    assert (tmp_path / "a.bin").read_bytes()[23:].startswith(b'{"tokens"')
    named, change = DAMAGES[damage]
    change(tmp_path)
    with pytest.raises(DataError, match=named):
        tokens_and_labels(open_corpus(config(tmp_path), vocab_size=100))


@pytest.mark.parametrize(("wrong", "reported"), [((1 << 32) + 5, (1 << 31) - 1), (-5, -5)])
def test_id_outside_the_vocabulary_is_reported_with_its_place(tmp_path: Path, wrong: int, reported: int) -> None:
    """Case 45."""
    write_megatron(tmp_path / "a", [[1, 2, 3], [4, 5, wrong, 7]], 5, "<i8")
    corpus = open_corpus(config(tmp_path), vocab_size=103_168)
    with pytest.raises(DataError, match=rf"a.bin: token 5 is id {reported}"):
        tokens_and_labels(corpus)


def test_file_in_both_splits_is_reported(tmp_path: Path) -> None:
    for stem in ("train/en/a", "train/valid/b", "held/c"):
        (tmp_path / stem).parent.mkdir(parents=True, exist_ok=True)
        documents = DOCUMENTS[:2] if stem == "train/en/a" else [[5, 6], [7, 8, 9, 10, 11]]
        write_megatron(tmp_path / stem, documents, 4, "<i4")
    for held_out, file in (("train/valid", "train/valid/b"), ("held", "held/c")):
        settings = config(tmp_path / "train", valid_input=str(tmp_path / held_out))
        with pytest.raises(DataError, match=f"{file}.bin of data.valid_input"):
            open_corpus(settings, vocab_size=103_168)
    write_megatron(tmp_path / "held" / "c", [[5, 7], [7, 8, 9, 10, 11]], 4, "<i4")  # the same lengths, other tokens
    assert open_corpus(settings, vocab_size=103_168).valid.n_packs
