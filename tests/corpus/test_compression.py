"""What is packed is read in bounded memory, and of a damaged file all that comes before the damage."""

import gzip
import io
import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.compression import DamageError, Unpacked, unpacked
from tests.corpora import PACKED, ROOT

KINDS = [kind for kind in PACKED if kind]
SKIPPABLE = bytes.fromhex("502a4d18") + (4).to_bytes(4, "little") + b"skip"  # a frame of Zstandard without content


def opened(kind: str, packed: bytes) -> Unpacked:
    return Unpacked(io.BytesIO(packed), kind)


def read_all(file: Unpacked, size: int) -> tuple[bytes, DamageError | None]:
    """Read in pieces of a size to the end, or to a damage."""
    found = b""
    try:
        while piece := file.read(size):
            assert len(piece) <= size
            found += piece
    except DamageError as error:
        with pytest.raises(DamageError):
            file.read(1)
        return found, error
    return found, None


contents = st.lists(st.binary(max_size=3000), max_size=4)


@pytest.mark.parametrize("kind", KINDS)
@given(parts=contents, size=st.integers(1, 4000))
@settings(max_examples=60, deadline=None)
def test_streams_one_after_the_other_are_one_text(kind: str, parts: list[bytes], size: int) -> None:
    packed = b"".join(map(PACKED[kind], parts))
    assert read_all(opened(kind, packed), size) == (b"".join(parts), None)


@pytest.mark.parametrize("kind", KINDS)
@given(parts=contents, size=st.integers(1, 4000), data=st.data())
@settings(max_examples=60, deadline=None)
def test_of_a_file_that_is_cut_short_or_goes_on_with_something_else_all_before_it_is_given(
    kind: str, parts: list[bytes], size: int, data: st.DataObject
) -> None:
    streams = [PACKED[kind](part) for part in parts]
    cut = PACKED[kind](b"the last one " * 40)
    rest = data.draw(st.sampled_from([b"no stream", *(cut[:n] for n in (1, len(cut) // 2, len(cut) - 1))]))
    found, damage = read_all(opened(kind, b"".join(streams) + rest), size)
    told = "the compressed file is damaged or cut short here (" if streams or rest != b"no stream" else "this is no "
    assert damage is not None and str(damage).startswith(told)
    whole = b"".join(parts)
    assert found.startswith(whole) and (b"the last one " * 40).startswith(found[len(whole) :])


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_changed_are_a_damage_and_what_is_well_before_them_is_given(kind: str) -> None:
    draw = random.Random(0)
    text = b" ".join(b"%d" % draw.randrange(10_000) for _ in range(600_000))
    packed = PACKED[kind](text)
    half = len(packed) // 2
    found, damage = read_all(opened(kind, packed[:half] + b"\xff" * 64 + packed[half + 64 :]), 100_000)
    sound = len(text) // 2 - (1 << 20)  # but for the block of the format that it lies in
    assert damage is not None and found[:sound] == text[:sound]


def test_a_wrong_checksum_is_a_damage() -> None:
    packed = bytearray(gzip.compress(b"text " * 100))
    packed[-6] ^= 1
    assert read_all(opened(".gz", bytes(packed)), 7)[1] is not None


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_after_a_stream_are_padding_where_the_format_allows_it(kind: str) -> None:
    packed = PACKED[kind](b"one") + bytes(9000) + PACKED[kind](b"two") + bytes(8)
    found, damage = read_all(opened(kind, packed), 100)
    assert (found, damage is None) == ((b"onetwo", True) if kind in (".gz", ".xz") else (b"one", False))


def test_frames_without_content_are_passed_over() -> None:
    packed = SKIPPABLE + PACKED[".zst"](b"one") + SKIPPABLE + PACKED[".zst"](b"two")
    assert read_all(opened(".zst", packed), 100) == (b"onetwo", None)


def test_what_the_disk_says_is_no_damage(tmp_path: Any) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        Unpacked(Broken(), ".gz").read(10)
    (tmp_path / "a.gz").write_bytes(b"")
    with unpacked(str(tmp_path / "a.gz")) as file:
        assert file.read(10) == b""


MEASURED = """
import sys
from pathlib import Path
from corpus.compression import unpacked
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10
before, size = peak(), 0
with unpacked(sys.argv[1]) as file:
    while piece := file.read(1 << 20):
        size += len(piece)
print(size, peak() - before)
"""


@pytest.mark.parametrize("kind", [".gz", ".xz", ".zst"])  # .bz2 takes minutes to make it
def test_a_text_that_repeats_itself_is_never_whole_in_memory(tmp_path: Any, kind: str) -> None:
    path = tmp_path / f"a{kind}"
    path.write_bytes(PACKED[kind](b"the same words again and again, " * (200_000_000 // 32)))
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    size, more = map(int, done.stdout.split())
    assert size == 200_000_000 // 32 * 32 and more < 100
