"""Shards give back what was written, and say what is wrong with a damaged one."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.config import DataError
from data.shards import Shard, ShardWriter


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
    assert shard.tokens.dtype == np.dtype(dtype)
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


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    (
        "bin cut short",
        lambda d: (d / "a.bin").write_bytes((d / "a.bin").read_bytes()[:-1]),
        "a.bin has 15 bytes where",
    ),
    ("idx cut short", lambda d: (d / "a.idx").write_bytes(b"1234567"), "a.idx has 7 bytes where"),
    ("bin missing", lambda d: (d / "a.bin").unlink(), "a.bin is missing"),
    (
        "header missing",
        lambda d: (d / "a.json").unlink(),
        "is missing, so the shard beside it is not complete",
    ),
    ("header no JSON", lambda d: (d / "a.json").write_text("{"), "is not a shard's header"),
    ("header of something else", lambda d: (d / "a.json").write_text("{}"), "is not a shard's header"),
    (
        "newer format",
        lambda d: rewrite(d / "a.json", lambda h: h.update(format_version=9)),
        "format_version 9 is not 1",
    ),
    ("wrong dtype", lambda d: rewrite(d / "a.json", lambda h: h.update(dtype="int3")), r"dtype \(int3\)"),
    (
        "offsets that go back",
        lambda d: (d / "a.idx").write_bytes(np.array([0, 9, 3, 8], dtype="<i8").tobytes()),
        "does not count from 0 up to the 8 tokens",
    ),
]


@pytest.mark.parametrize(("damage", "sentence"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: Callable[[Path], object], sentence: str) -> None:
    write(tmp_path / "a")
    damage(tmp_path)
    with pytest.raises(DataError, match=sentence):
        Shard(tmp_path / "a")


def test_a_flipped_bit_is_found_by_the_hash(tmp_path: Path) -> None:
    raw = bytearray(write(tmp_path / "a").with_suffix(".bin").read_bytes())
    raw[5] ^= 1
    (tmp_path / "a.bin").write_bytes(raw)
    Shard(tmp_path / "a")
    with pytest.raises(DataError, match="its hash differs"):
        Shard(tmp_path / "a", verify=True)
