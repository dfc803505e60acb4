"""Compressed files are read whole, or as far as they are sound."""

import gzip
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.compression import DAMAGE, open_content
from tests.corpora import PACKED

KINDS = [kind for kind in PACKED if kind]
SKIPPABLE = bytes.fromhex("502a4d18") + (4).to_bytes(4, "little") + b"skip"  # a Zstandard frame without content


def read_all(path: Path, packed: bytes, size: int = 1 << 16) -> tuple[bytes, bool]:
    """Return what can be read in pieces of a size, and whether damage ended it."""
    path.write_bytes(packed)
    found = b""
    with open_content(str(path)) as file:
        try:
            while piece := file.read(size):
                assert len(piece) <= size
                found += piece
        except (*DAMAGE, OSError):
            return found, True
    return found, False


@pytest.mark.parametrize("kind", KINDS)
@given(parts=st.lists(st.binary(max_size=3000), min_size=1, max_size=4), size=st.integers(1, 4000))
@settings(max_examples=30, deadline=None)
def test_concatenated_streams_are_one_text(
    tmp_path_factory: pytest.TempPathFactory, kind: str, parts: list[bytes], size: int
) -> None:
    path = tmp_path_factory.mktemp("packed") / f"a{kind}"
    assert read_all(path, b"".join(map(PACKED[kind], parts)), size) == (b"".join(parts), False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lost", [1, 9, 40])
def test_truncation_is_damage(tmp_path: Path, kind: str, lost: int) -> None:
    text = random.Random(0).randbytes(4000)
    found, damaged = read_all(tmp_path / f"a{kind}", PACKED[kind](b"first ") + PACKED[kind](text)[:-lost])
    assert damaged and (b"first " + text).startswith(found)


@pytest.mark.parametrize("kind", KINDS)
def test_another_format_is_damage(tmp_path: Path, kind: str) -> None:
    assert read_all(tmp_path / f"a{kind}", b"plain text, not what the suffix says") == (b"", True)


def test_wrong_checksum_is_damage(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(b"text " * 100))
    packed[-6] ^= 1
    assert read_all(tmp_path / "a.gz", bytes(packed))[1]


def test_zstandard_frames_without_content_are_skipped(tmp_path: Path) -> None:
    packed = SKIPPABLE + PACKED[".zst"](b"one") + SKIPPABLE + PACKED[".zst"](b"two")
    assert read_all(tmp_path / "a.zst", packed) == (b"onetwo", False)
