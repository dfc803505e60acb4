"""Shards are read as they were written, and a damaged one is named."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.config import DataError
from data.shards import INDEX_HEADER, Shard, ShardWriter
from tests.data.conftest import write_shard


def write(stem: Path, vocab_size: int = 1000) -> Shard:
    documents = [np.arange(length) + vocab_size - 10 for length in (3, 0, 5)]
    return write_shard(stem, documents, vocab_size=vocab_size)


@pytest.mark.parametrize(("vocab_size", "n_bytes"), [(65536, 2), (65537, 4)])
def test_documents_are_stored_in_the_smallest_type(tmp_path: Path, vocab_size: int, n_bytes: int) -> None:
    shard = write(tmp_path / "a", vocab_size)
    assert shard.dtype.itemsize == n_bytes
    assert shard.header is not None and (shard.header.documents, shard.header.tokens) == (3, 8)
    assert shard.header.max_token == vocab_size - 6
    shard.read(0, 1)
    for reader in (shard, pickle.loads(pickle.dumps(shard))):
        first = vocab_size - 10
        found = [reader.document(i).tolist() for i in range(3)]
        assert found == [[first, first + 1, first + 2], [], list(range(first, first + 5))]


def test_id_outside_the_vocabulary_is_not_written(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a", vocab_size=100, tokenizer="t")
    with pytest.raises(DataError, match="a.bin: token 100"):
        writer.add(np.array([100], dtype=np.uint32), np.array([1]), 1)
    writer.file.close()


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def patch(path: Path, at: int, raw: bytes) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:at] + raw + content[at + len(raw) :])


def cut(path: Path, n_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:n_bytes])


SECOND_START = INDEX_HEADER.size + 3 * 4 + 8  # of the second document, in a.idx
ENDS = INDEX_HEADER.size + 3 * 12  # of the documents, in a.idx
DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "bin cut short": ("a.bin", lambda path: cut(path, -2)),
    "bin missing": ("a.bin", Path.unlink),
    "flipped bit": ("a.bin", lambda path: patch(path, 5, b"\x01")),
    "idx cut short": ("a.idx", lambda path: cut(path, 7)),
    "wrong magic": ("a.idx", lambda path: patch(path, 0, b"XX")),
    "unknown type": ("a.idx", lambda path: patch(path, 17, b"\x06")),
    "another count": ("a.idx", lambda path: rewrite(path.with_suffix(".json"), documents=4)),
    "header of something else": ("a.json", lambda path: path.write_text("{}")),
    "newer format": ("a.json", lambda path: rewrite(path, format_version=9)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    """Case 46."""
    write(tmp_path / "a")
    name, change = DAMAGES[damage]
    change(tmp_path / name)
    with pytest.raises(DataError, match=name):
        Shard(tmp_path / "a", verify=True)


@pytest.mark.parametrize(("at", "value"), [(SECOND_START, 99), (ENDS + 8, 3)], ids=["past the end", "not in order"])
def test_wrong_offsets_without_a_header(tmp_path: Path, at: int, value: int) -> None:
    write(tmp_path / "a")
    (tmp_path / "a.json").unlink()
    patch(tmp_path / "a.idx", at, struct.pack("<q", value))
    with pytest.raises(DataError, match="a.idx"):
        Shard(tmp_path / "a").ends_between(np.array([0]), np.array([8]))


def test_file_cut_short_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """Case 46."""
    shard = write(tmp_path / "a")
    assert shard.read(0, 8).tolist()[:3] == [990, 991, 992]
    os.truncate(tmp_path / "a.bin", 8)
    with pytest.raises(DataError, match="a.bin"):
        shard.read(2, 6)


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=200).filter(sum),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5),
)
@settings(max_examples=50, deadline=None)
def test_ends_are_found_without_all_offsets_in_memory(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], ranges: list[tuple[float, float]]
) -> None:
    stem = tmp_path_factory.mktemp("s") / "a"
    writer = ShardWriter(stem, vocab_size=100, tokenizer="t")
    writer.add(np.zeros(sum(lengths), dtype=np.uint32), np.array(lengths), 0)
    writer.close()
    shard, total = Shard(stem), sum(lengths)
    limits = [sorted((int(a * total), int(b * total))) for a, b in ranges]
    starts, stops = np.array(limits).T
    found, counts = shard.ends_between(starts, stops)
    expected = [[e for e in sorted(set(np.cumsum(lengths).tolist())) if a < e <= b] for a, b in limits]
    assert counts.tolist() == [len(ends) for ends in expected]
    assert found.tolist() == [end for ends in expected for end in ends]
