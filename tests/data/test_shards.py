"""Shards give back what was written, and say what is wrong with a damaged one."""

import dataclasses
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.config import DataError
from data.shards import INDEX_HEADER, Shard, ShardWriter


def write(stem: Path, vocab_size: int = 1000) -> Path:
    writer = ShardWriter(stem, vocab_size=vocab_size, tokenizer="t")
    for length in (3, 0, 5):
        writer.add(np.arange(length, dtype=np.uint32) + vocab_size - 10, length)
    writer.close()
    return stem


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1000, "<u2"), (65536, "<u2"), (65537, "<u4"), (103168, "<u4")])
def test_documents_come_back_in_the_smallest_type_that_holds_the_vocabulary(
    tmp_path: Path, vocab_size: int, dtype: str
) -> None:
    shard = Shard(write(tmp_path / "a", vocab_size), verify=True)
    assert shard.dtype == np.dtype(dtype)
    assert [shard.document(i).tolist() for i in range(3)] == [
        [vocab_size - 10, vocab_size - 9, vocab_size - 8], [], list(range(vocab_size - 10, vocab_size - 5)),
    ]  # fmt: skip


def test_an_id_outside_the_vocabulary_is_not_written(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a", vocab_size=100, tokenizer="t")
    with pytest.raises(DataError, match=r"token 100 is outside the vocabulary \(100\)"):
        writer.add(np.array([100], dtype=np.uint32), 1)
    writer.close()


def rewrite(path: Path, change: Callable[[dict], None]) -> None:
    header = json.loads(path.read_text())
    change(header)
    path.write_text(json.dumps(header))


def patch(path: Path, at: int, raw: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(raw)] = raw
    path.write_bytes(content)


SECOND_START = INDEX_HEADER.size + 3 * 4 + 8  # of the second document, in a.idx
ENDS = INDEX_HEADER.size + 3 * 12  # of the documents, in a.idx
DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("bin cut short", lambda d: (d / "a.bin").write_bytes((d / "a.bin").read_bytes()[:-2]), "a.bin has 14 bytes where its header says 16"),
    ("bin of half a token", lambda d: (d / "a.bin").write_bytes((d / "a.bin").read_bytes()[:-1]), "a.bin has 15 bytes, no multiple of a token's 2"),
    ("bin empty", lambda d: (d / "a.bin").write_bytes(b""), "a.bin has 0 bytes where"),
    ("bin missing", lambda d: (d / "a.bin").unlink(), "a.bin is missing"),
    ("idx cut short", lambda d: (d / "a.idx").write_bytes(b"1234567"), "a.idx has 7 bytes, so it is no index"),
    ("idx empty", lambda d: (d / "a.idx").write_bytes(b""), "a.idx has 0 bytes, so it is no index"),
    ("idx cut at its end", lambda d: (d / "a.idx").write_bytes((d / "a.idx").read_bytes()[:-8]), r"a.idx has \d+ bytes where its own header says"),
    ("idx missing", lambda d: (d / "a.idx").unlink(), "a.idx is missing"),
    ("wrong magic", lambda d: patch(d / "a.idx", 0, b"XX"), "a.idx does not begin as an index of tokens does"),
    ("unknown type", lambda d: patch(d / "a.idx", 17, b"\x06"), "a.idx does not begin as an index of tokens does"),
    ("other count", lambda d: rewrite(d / "a.json", lambda h: h.update(documents=4)), "a.idx has 3 documents where the header says 4"),
    ("header no JSON", lambda d: (d / "a.json").write_text("{"), "is not a shard's header"),
    ("header of something else", lambda d: (d / "a.json").write_text("{}"), "is not a shard's header"),
    ("newer format", lambda d: rewrite(d / "a.json", lambda h: h.update(format_version=9)), "format_version 9 is not 2"),
    ("wrong dtype", lambda d: rewrite(d / "a.json", lambda h: h.update(dtype="int3")), r"dtype \(int3\)"),
    ("flipped bit", lambda d: patch(d / "a.bin", 5, b"\x01"), "a.bin is not what was written: its hash differs"),
]  # fmt: skip
FOREIGN_DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("offset past the end", lambda d: patch(d / "a.idx", SECOND_START, struct.pack("<q", 99)), r"a.idx: document 1 is from token 49 to 3 of 8"),
    ("offset before 0", lambda d: patch(d / "a.idx", SECOND_START, struct.pack("<q", -4)), r"a.idx: document 0 is from token 0 to -2 of 8"),
    ("documents past the sequences", lambda d: patch(d / "a.idx", ENDS + 24, struct.pack("<q", 9)), "its documents do not divide its 3 sequences"),
    ("documents that go back", lambda d: patch(d / "a.idx", ENDS + 8, struct.pack("<q", 3)), "its documents do not divide its 3 sequences"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "sentence"), [d[1:] for d in FOREIGN_DAMAGES], ids=[d[0] for d in FOREIGN_DAMAGES])
def test_an_index_that_cannot_be_is_named_without_a_header_too(
    tmp_path: Path, damage: Callable[[Path], object], sentence: str
) -> None:
    write(tmp_path / "a")
    (tmp_path / "a.json").unlink()
    damage(tmp_path)
    shard = Shard(tmp_path / "a")
    with pytest.raises(DataError, match=f"{sentence}.*; prepare it again$"):
        shard.ends_between(np.array([0]), np.array([8]))


@pytest.mark.parametrize(("damage", "sentence"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: Callable[[Path], object], sentence: str) -> None:
    write(tmp_path / "a")
    damage(tmp_path)
    with pytest.raises(DataError, match=f"{sentence}.*; prepare (it|the corpus) again$"):
        Shard(tmp_path / "a", verify=True)


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    shard = Shard(write(tmp_path / "a"))
    assert shard.read(0, 8).tolist()[:3] == [990, 991, 992]
    os.truncate(tmp_path / "a.bin", 8)
    with pytest.raises(
        DataError, match="a.bin was cut short while it was in use: 2 of 6 tokens could be read at token 2"
    ):
        shard.read(2, 6)


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=200).filter(sum),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5),
)
@settings(max_examples=100, deadline=None)
def test_the_ends_of_documents_are_found_without_all_offsets_in_memory(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], ranges: list[tuple[float, float]]
) -> None:
    stem = tmp_path_factory.mktemp("s") / "a"
    writer = ShardWriter(stem, vocab_size=100, tokenizer="t")
    writer.add_many(np.zeros(sum(lengths), dtype=np.uint32), np.array(lengths), 0)
    writer.close()
    shard, total = Shard(stem), sum(lengths)
    limits = [sorted((int(a * total), int(b * total))) for a, b in ranges]
    starts, stops = np.array(limits).T
    found, counts = shard.ends_between(starts, stops)
    expected = [[e for e in sorted(set(np.cumsum(lengths).tolist())) if a < e <= b] for a, b in limits]
    assert counts.tolist() == [len(ends) for ends in expected]
    assert found.tolist() == [end for ends in expected for end in ends]


def test_a_document_in_parts_is_one_and_a_writer_goes_on_from_where_another_was(tmp_path: Path) -> None:
    whole = ShardWriter(tmp_path / "whole", vocab_size=100, tokenizer="t")
    parts = ShardWriter(tmp_path / "parts", vocab_size=100, tokenizer="t")
    ids = np.arange(60, dtype=np.uint32)
    for part in (ids[:7], ids[7:20], ids[20:]):
        parts.add(part, len(part), ends=part[-1] == 59)
    whole.add(ids, 60)
    parts.sync()
    kept = dataclasses.replace(parts.written)
    parts.add(ids[:3], 3)  # after what is known to be written
    parts.close_files()
    again = ShardWriter(tmp_path / "parts", vocab_size=100, tokenizer="t", written=kept)
    for writer in (whole, again):
        writer.add(ids[:9], 9)
        writer.close()
        writer.forget()
    for name in ("bin", "idx", "json"):
        assert (tmp_path / f"whole.{name}").read_bytes() == (tmp_path / f"parts.{name}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if "parts" in path.name) == [
        "parts.bin",
        "parts.idx",
        "parts.json",
    ]
