"""Tokens of Megatron-LM and InternLM are read as those programs write them, and ours as Megatron-LM reads them."""

import dataclasses
import json
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corpus.config import DataError, Source
from data.config import DataConfig, Packing
from data.dataset import Corpus, open_corpus
from data.shards import Shard, ShardWriter
from data.tokenizer import Tokenizer

DOCUMENTS = [[5, 6, 7, 2], [], [8, 2], [103_000, 9, 10, 11, 12, 2]]


def write_megatron(stem: Path, documents: list[list[int]], code: int, dtype: str, *, sequences: int = 1) -> None:
    """Write what `IndexedDatasetBuilder` writes: each document `sequences` sequences, then `end_document()`."""
    parts = [np.array_split(np.array(document, dtype=dtype), sequences) for document in documents]
    lengths = [len(part) for its in parts for part in its]
    itemsize = np.dtype(dtype).itemsize
    starts = [itemsize * sum(lengths[:i]) for i in range(len(lengths))]
    ends = [0, *np.cumsum([len(its) for its in parts]).tolist()]
    with open(f"{stem}.bin", "wb") as file:
        for its in parts:
            for part in its:
                file.write(part.tobytes(order="C"))
    with open(f"{stem}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00")
        file.write(struct.pack("<Q", 1))
        file.write(struct.pack("<B", code))
        file.write(struct.pack("<Q", len(lengths)))
        file.write(struct.pack("<Q", len(ends)))
        file.write(np.array(lengths, dtype=np.int32).tobytes(order="C"))
        file.write(np.array(starts, dtype=np.int64).tobytes(order="C"))
        file.write(np.array(ends, dtype=np.int64).tobytes(order="C"))


def read_megatron(stem: Path) -> list[list[int]]:
    """Read as `_IndexReader` and `IndexedDataset.get` do."""
    dtypes = {
        1: np.uint8,
        2: np.int8,
        3: np.int16,
        4: np.int32,
        5: np.int64,
        6: np.float64,
        7: np.float32,
        8: np.uint16,
    }
    raw = Path(f"{stem}.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00" and struct.unpack("<Q", raw[9:17]) == (1,)
    dtype = np.dtype(dtypes[raw[17]])
    n_sequences, n_ends = struct.unpack("<QQ", raw[18:34])
    lengths = np.frombuffer(raw, dtype=np.int32, count=n_sequences, offset=34)
    pointers = np.frombuffer(raw, dtype=np.int64, count=n_sequences, offset=34 + lengths.nbytes)
    ends = np.frombuffer(raw, dtype=np.int64, count=n_ends, offset=34 + lengths.nbytes + pointers.nbytes)
    assert lengths.shape[0] == ends[-1] and len(raw) == 34 + lengths.nbytes + pointers.nbytes + ends.nbytes
    tokens = np.fromfile(f"{stem}.bin", dtype=np.uint8)
    sequences = [
        np.frombuffer(tokens, dtype=dtype, count=n, offset=at).tolist()
        for n, at in zip(lengths.tolist(), pointers.tolist(), strict=True)
    ]
    return [sum(sequences[a:b], []) for a, b in pairwise(ends)]


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
    plain = DataConfig(
        name="t", path="none", source=Source.tokens, input=str(folder), seq_len=4, micro_batch_size=1, workers=0
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def tokens_and_labels(corpus: Corpus) -> list[tuple[list[int], list[int]]]:
    batches = [corpus.train.batch(np.array([pack])) for pack in range(corpus.train.n_packs)]
    return [(b.tokens_BT[0].tolist(), b.labels_BT[0].tolist()) for b in batches]


@pytest.mark.parametrize(("code", "dtype"), [(4, "<i4"), (5, "<i8"), (8, "<u2"), (3, "<i2"), (1, "<u1")])
@pytest.mark.parametrize("sequences", [1, 3])
def test_what_megatron_writes_is_read_in_each_of_its_types(
    tmp_path: Path, code: int, dtype: str, sequences: int
) -> None:
    largest = min(np.iinfo(dtype).max, 103_000)
    documents = [[min(token, largest) for token in document] for document in DOCUMENTS] * 60
    write_megatron(tmp_path / "a", documents, code, dtype, sequences=sequences)
    shard = Shard(tmp_path / "a", verify=True)
    assert shard.n_documents == len(documents) and not shard.masked
    assert [shard.document(i).tolist() for i in range(shard.n_documents)] == documents
    ends, _ = shard.ends_between(np.array([0]), np.array([shard.n_tokens]))
    assert ends.tolist() == np.unique(np.cumsum([len(d) for d in documents])).tolist()


@pytest.mark.parametrize("modes", [False, True])
def test_a_folder_of_megatrons_files_is_trained_on_as_it_is(tmp_path: Path, modes: bool) -> None:
    for source in ("en", "code"):
        (tmp_path / source).mkdir()
        write_megatron(tmp_path / source / "a", DOCUMENTS, 4, "<i4")
    if modes:  # of multimodal data, a byte a sequence
        with open(tmp_path / "en" / "a.idx", "ab") as file:
            file.write(bytes(len(DOCUMENTS)))
    corpus = open_corpus(config(tmp_path), vocab_size=103_168)
    assert corpus.sources == ("code", "en")
    assert tokens_and_labels(corpus)[:3] == [
        ([5, 6, 7, 2], [6, 7, 2, -100]),
        ([8, 2, 103_000, 9], [2, -100, 9, 10]),
        ([10, 11, 12, 2], [11, 12, 2, -100]),
    ]


@pytest.mark.parametrize(("vocab_size", "code"), [(1000, 8), (103_168, 4)])
def test_what_is_written_here_megatron_reads(tmp_path: Path, vocab_size: int, code: int) -> None:
    documents = [[token % vocab_size for token in document] for document in DOCUMENTS]
    writer = ShardWriter(tmp_path / "a", vocab_size=vocab_size, tokenizer="t")
    for document in documents:
        writer.add(np.array(document, dtype=np.uint32), 0)
    writer.close()
    assert read_megatron(tmp_path / "a") == documents
    write_megatron(tmp_path / "theirs", documents, code, "<i4" if code == 4 else "<u2")
    for name in ("bin", "idx"):
        assert (tmp_path / f"a.{name}").read_bytes() == (tmp_path / f"theirs.{name}").read_bytes()


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_folder_of_internlms_files_is_trained_on_as_it_is(tmp_path: Path, dtype: Any) -> None:
    write_internlm(tmp_path / "train" / "cn" / "deep" / "a.bin", [[1, -6, -7, 8, 9], [1, 3]], dtype)
    write_internlm(tmp_path / "train" / "en" / "b.bin", [[1, 5, 6, 7]], dtype)
    write_internlm(tmp_path / "valid" / "en" / "b.bin", [[1, 5, 7, 7]], dtype)
    valid = str(tmp_path / "valid")
    corpus = open_corpus(config(tmp_path / "train", valid_input=valid), vocab_size=10)
    assert corpus.sources == ("cn", "en") and corpus.valid.n_packs == 1
    assert tokens_and_labels(corpus) == [
        ([1, 6, 7, 8], [-100, -100, 8, 9]),  # negated tokens are read and not learnt
        ([9, 1, 3, 0], [-100, 3, -100, -100]),
        ([1, 5, 6, 7], [5, 6, 7, -100]),
    ]
    ordered = config(tmp_path / "train", packing=Packing.internlm, seq_len=2)
    assert open_corpus(ordered, vocab_size=10).train.n_packs == 3 + 2


def test_internlms_published_pack_comes_from_internlms_files(tmp_path: Path) -> None:
    """Documents of 5, 3, 9, 2 and 7 tokens in the order 2 0 4 1 3, as its PackedDataset packs them."""
    lengths = (5, 3, 9, 2, 7)
    documents = [[10 * (k + 1) + j for j in range(length)] for k, length in enumerate(lengths)]
    write_internlm(tmp_path / "en" / "a.bin", documents, np.int32)
    corpus = open_corpus(config(tmp_path, packing=Packing.internlm, pack_len=8, micro_batch_size=2), vocab_size=100)
    layout: Any = corpus.train.layouts[0]
    layout.order = np.array([2, 0, 4, 1, 3])
    layout.limits = np.concatenate([[0], np.cumsum(layout.length[layout.order])])
    batch = corpus.train.batch(np.array([1]))
    assert batch.tokens_BT[0].tolist() == [38, 10, 11, 12, 13, 14, 50, 51]
    assert batch.labels_BT[0].tolist() == [-100, 11, 12, 13, 14, -100, 51, 52]
    assert batch.cu_seqlens.tolist() == [0, 1, 5, 6, 8]


def test_a_tokenizer_may_be_named_for_tokens_and_gives_bytes_a_token(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_megatron(tmp_path / "a", [tokenizer.encode("some text of ours")] * 4, 4, "<i4")
    corpus = open_corpus(config(tmp_path, tokenizer=str(tokenizer.path)), vocab_size=1280)
    assert corpus.bytes_per_token is not None and len(corpus.bytes_per_token) == 1280
    assert open_corpus(config(tmp_path), vocab_size=1280).bytes_per_token is None


def rewrite_meta(folder: Path, rows: Any) -> None:
    with open(folder / "a.bin.meta", "wb") as file:
        np.save(file, rows, allow_pickle=True)


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("no index", lambda d: (d / "a.bin.meta").unlink(), r"a.bin has no index beside it: neither a.idx \(Megatron\) nor a.bin.meta \(InternLM\)"),
    ("index no array", lambda d: (d / "a.bin.meta").write_bytes(b"no array"), "a.bin.meta is no array of offsets"),
    ("index empty", lambda d: (d / "a.bin.meta").write_bytes(b""), "a.bin.meta is no array of offsets"),
    ("array of objects", lambda d: rewrite_meta(d, np.array([[0, 3], [None, 2]], dtype=object)), "a.bin.meta is no array of offsets"),
    ("floating point", lambda d: rewrite_meta(d, np.zeros((2, 2))), r"holds float64 \(2, 2\), not rows"),
    ("one column", lambda d: rewrite_meta(d, np.zeros(2, dtype=np.int64)), r"holds int64 \(2,\), not rows"),
    ("past the end", lambda d: rewrite_meta(d, np.array([[0, 3], [999, 2]])), r"row 1 says that document 1 begins at byte 999 of \d+ and has 2 tokens; a.bin was cut short, or is not the one"),
    ("wrapped at 2 GiB", lambda d: rewrite_meta(d, np.array([[0, 3], [-2147483600, 2]], dtype=np.int32)), "are those of a file over 2 GiB in 32 bits"),
    ("not in order", lambda d: rewrite_meta(d, np.array([[23, 2], [0, 3]])), "row 1 says that document 1 begins at byte 0 of .* offsets that go back are those"),
    ("another count", lambda d: rewrite_meta(d, np.array([[0, 4], [23, 2]])), "document 0 has 3 tokens where a.bin.meta says 4"),
    ("bin cut short", lambda d: (d / "a.bin").write_bytes((d / "a.bin").read_bytes()[:-4]), r"a.bin: document 1, at byte 23, is no line of tokens"),
    ("no line of tokens", lambda d: (d / "a.bin").write_bytes(b"x" * 39), "a.bin: document 0, at byte 0, is no line of tokens"),
    ("no file", lambda d: [p.unlink() for p in d.iterdir()], "is no folder with .bin files"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "sentence"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_a_damaged_file_of_internlms_is_named(tmp_path: Path, damage: Callable[[Path], object], sentence: str) -> None:
    write_internlm(tmp_path / "a.bin", [[1, 2, 33], [1, 22]], np.int64)
    assert (tmp_path / "a.bin").read_bytes()[23:].startswith(b'{"tokens"')
    damage(tmp_path)
    with pytest.raises(DataError, match=sentence):
        corpus = open_corpus(config(tmp_path), vocab_size=100)
        tokens_and_labels(corpus)


@pytest.mark.parametrize(
    ("wrong", "told", "code", "dtype"),
    [(103_168, 103_168, 4, "<i4"), (-5, -5, 4, "<i4"), ((1 << 32) + 5, (1 << 31) - 1, 5, "<i8"), (-5, -5, 5, "<i8")],
)
def test_an_id_of_theirs_outside_the_vocabulary_is_told_with_its_place(
    tmp_path: Path, wrong: int, told: int, code: int, dtype: str
) -> None:
    write_megatron(tmp_path / "a", [[1, 2, 3], [4, 5, wrong, 7]], code, dtype)
    corpus = open_corpus(config(tmp_path), vocab_size=103_168)
    with pytest.raises(DataError, match=rf"a.bin: token 5, in document 1, is id {told}, outside model.vocab_size"):
        tokens_and_labels(corpus)


@pytest.mark.parametrize(("wrong", "sentence"), [(1 << 31, "holds an id over 2147483647"), (1 << 63, "is no line of")])
def test_an_id_of_internlms_that_no_vocabulary_has_is_told(tmp_path: Path, wrong: int, sentence: str) -> None:
    write_internlm(tmp_path / "a.bin", [[1, 2], [3, -7]], np.int64)
    raw = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(raw.replace(b"-7", str(wrong).encode()))
    with pytest.raises(DataError, match=rf"a.bin: document 1, at byte \d+, {sentence}"):
        tokens_and_labels(open_corpus(config(tmp_path), vocab_size=100))


def test_tokens_that_are_held_out_and_trained_on_are_refused(tmp_path: Path) -> None:
    for stem in ("train/en/a", "train/valid/b", "held/c"):
        (tmp_path / stem).parent.mkdir(parents=True, exist_ok=True)
        documents = DOCUMENTS[:2] if stem == "train/en/a" else [[5, 6], [7, 8, 9, 10, 11]]
        write_megatron(tmp_path / stem, documents, 4, "<i4")
    train = config(tmp_path / "train")
    for held_out, file in (("train/valid", "train/valid/b"), ("held", "held/c"), ("train", "train/en/a")):
        overlapping = dataclasses.replace(train, valid_input=str(tmp_path / held_out))
        with pytest.raises(DataError, match=rf"{file}.bin of data.valid_input \(.*\) would be trained on as .*.bin of"):
            open_corpus(overlapping, vocab_size=103_168)
    write_megatron(tmp_path / "held" / "c", [[5, 7], [7, 8, 9, 10, 11]], 4, "<i4")  # the same lengths, other tokens
    held_out = dataclasses.replace(train, valid_input=str(tmp_path / "held"))
    assert open_corpus(held_out, vocab_size=103_168).valid.n_packs
