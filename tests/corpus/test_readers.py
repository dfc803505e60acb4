"""Every format is read, whole and by ranges; what cannot be read is named and left out alone."""

import bz2
import gzip
import itertools
import json
import lzma
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import readers
from corpus.config import DataError, OnBadRecord, Source
from corpus.documents import LeftOut
from corpus.inputs import list_items
from corpus.readers import Lines, Reader
from corpus.units import plan_units
from data.config import DataConfig
from data.tokenizer import Tokenizer
from tests.corpora import PACKED, PLAIN, RECORDS, lines, local, made, n_documents, not_utf8, parquet, read, texts, write

TEXTS = [record["text"] for record in RECORDS]
SKIPPABLE = bytes.fromhex("502a4d18") + (4).to_bytes(4, "little") + b"skip"  # a Zstandard frame without content


def read_units(config: DataConfig, left_out: LeftOut) -> list[str]:
    """Return the texts of a corpus, read unit after unit by one reader."""
    items, reader = list_items(config), Reader(config)
    spans = [span for unit in plan_units(items, config) for span in unit.spans]
    found = [d for s in spans for d in reader.documents(items[s.item], left_out, s.start, s.stop)]
    reader.close()
    return [document.text for document in found]


@pytest.mark.parametrize("name", [*(f".jsonl{packed}" for packed in PACKED), ".json.zst", ".parquet", ".parquet.gz"])
def test_documents_of_every_format(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "READ_BYTES", 100)  # records lie across reads
    monkeypatch.setattr("corpus.units.LEAST_UNIT_BYTES", 150)
    plain, packed = "." + name.split(".")[1], name[len(name.split(".")[1]) + 1 :]
    (tmp_path / f"a{name}").write_bytes(PACKED[packed](PLAIN[plain](RECORDS)))
    config = local(tmp_path, f"a{name}", source_key="meta.set")
    assert texts(config) == TEXTS == read_units(config, LeftOut(OnBadRecord.error))
    assert [d.source for d in read(config)] == [record["meta"]["set"] for record in RECORDS]


@pytest.mark.parametrize("packed", ["", ".xz"])
def test_text_files_and_text_lines(tmp_path: Path, packed: str) -> None:
    (tmp_path / f"a.txt{packed}").write_bytes(PACKED[packed](b"one\n\n  two\n"))
    assert texts(local(tmp_path, f"a.txt{packed}")) == ["one\n\n  two\n"]
    assert texts(local(tmp_path, f"a.txt{packed}", text_lines=True)) == ["one", "two"]


@given(
    st.lists(st.integers(0, 60), max_size=30), st.lists(st.integers(0, 900), max_size=5), st.booleans(),
    st.integers(1, 50), st.sampled_from(["", ".gz"]), st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_ranges_share_lines_out(
    tmp_path_factory: Any, sizes: list[int], cuts: list[int], ended: bool, block: int, packed: str, anew: bool
) -> None:
    """Every line is in one range, the one that it begins in, whether or not the file is opened anew for each."""
    text = b"".join(b"%d" % (k % 10) * size + b"\n" for k, size in enumerate(sizes)) + b"last" * (not ended)
    path = tmp_path_factory.mktemp("lines") / f"a.jsonl{packed}"
    path.write_bytes(PACKED[packed](text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "READ_BYTES", block)
        found, reader = b"", Lines(str(path))
        for start, stop in itertools.pairwise([0, *sorted(cuts), readers.END]):
            if anew:
                reader.file.close()
                reader = Lines(str(path))
            for at, line in reader.read(start, stop):
                assert line is not None and at == len(found) and start <= at < stop and line.count(b"\n") <= 1
                found += line
        reader.file.close()
    assert found == text


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt"])
def test_too_large_document_is_bad_record(tmp_path: Path, name: str) -> None:
    """Case 47."""
    records = [{"text": "before"}, {"text": "x" * (1 << 20)}, {"text": "y" * (1 << 20) + "y"}, {"text": "after"}]
    plain = "." + name.split(".")[1]
    content = b"z" * (1 << 21) if plain == ".txt" else PLAIN[plain](records)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    left_out = LeftOut(OnBadRecord.skip)
    found = [len(text) for text in texts(local(tmp_path, name, max_document_mb=1), left_out)]
    # of a line the limit is that of its JSON
    assert found == {".txt": [], ".jsonl": [6, 5]}.get(plain, [6, 1 << 20, 5])
    assert left_out.count == {".jsonl": 2}.get(plain, 1) and all("max_document_mb" in p for p in left_out.places)


BAD = [
    ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "a.jsonl:2: "),
    ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl:1: "),
    ("a.jsonl", b'{"body": "x"}\n', r"a.jsonl:1: data.text_key \(text\).* body"),
    ("a.jsonl", b'["text"]\n', r"data.text_key \(text\).* list"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "surrogate"),
    ("a.jsonl", b"[" * 100_000 + b"\n", "a.jsonl:1: "),
    ("a.json", b'{"text": "x"}', "list of records"),
    ("a.json", b'[{"text": "x"}, {"text": }]', "a.json: not JSON"),
    ("a.json", b'[{"text": "x"}, {"body": "x"}]', r"a.json\[1\]: data.text_key"),
    ("a.jsonl.gz", gzip.compress(lines(RECORDS))[:-20], "damaged"),
    ("a.jsonl.gz", b"not gzip", "damaged"),
    ("a.jsonl.zst", zstandard.compress(lines(RECORDS))[:-9], "damaged"),
    ("a.jsonl.zst", b"not Zstandard", "damaged"),
    ("a.jsonl.xz", lzma.compress(lines(RECORDS))[:-40], "damaged"),
    ("a.jsonl.bz2", bz2.compress(lines(RECORDS))[:-40], "damaged"),
    ("a.parquet", parquet(RECORDS)[:-9], "a.parquet: unreadable"),
    ("a.parquet", parquet([{"body": "x"}]), "a.parquet: .*no column text among body"),
    ("a.parquet", parquet([{"text": 3}]), r"a.parquet\[0\]: data.text_key"),
    ("a.txt", b"fine \xff", "a.txt: not UTF-8 at byte 5"),
]


@pytest.mark.parametrize(("name", "content", "place"), BAD, ids=range(len(BAD)))
def test_bad_record_is_named_or_counted(tmp_path: Path, name: str, content: bytes, place: str) -> None:
    """Case 47."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=place):
        read(local(tmp_path, name))
    left_out = LeftOut(OnBadRecord.skip)
    read(local(tmp_path, name), left_out)
    assert left_out.count == len(left_out.places) == 1


def test_other_records_and_files_are_read(tmp_path: Path) -> None:
    mixed: list[Any] = [{"text": "a"}, {"content": "b"}, {"text": ["c"]}, {"text": " "}, "d", {"text": "e", "meta": 3}]
    damaged, nulls = parquet([{"body": "g"}]), parquet([{"text": "h"}, {"text": None}])
    files = {"a.jsonl": lines(mixed) + b"{\n" * 20, "b.parquet": damaged, "c.parquet": nulls, "d.jsonl": b"\n \n"}
    write(tmp_path, files)
    pq.write_table(pyarrow.table({"text": not_utf8([b"i", b"\xff", b"k"])}), tmp_path / "e.parquet")
    left_out = LeftOut(OnBadRecord.skip)
    assert texts(local(tmp_path, "*"), left_out) == ["a", "e", "h", "i", "k"]
    assert left_out.count == 26 and left_out.empty == 1
    assert [place.split(": ")[0][-1:] for place in left_out.places[:4]] == ["2", "3", "5", "7"]
    assert len(left_out.places) == 10


def test_place_of_a_later_range_is_its_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corpus.units.LEAST_UNIT_BYTES", 200)
    before = lines(RECORDS[:20])
    (tmp_path / "a.jsonl").write_bytes(before + b"{\n" + lines(RECORDS[20:]))
    left_out = LeftOut(OnBadRecord.skip)
    assert len(read_units(local(tmp_path, "a.jsonl"), left_out)) == len(RECORDS)
    assert left_out.places[0].startswith(f"{tmp_path}/a.jsonl: line at byte {len(before)}: ")


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_concatenated_streams_up_to_the_damage(tmp_path: Path, packed: str) -> None:
    written = [f"{i} " + str(hash((i, "x")) ** 9) for i in range(8_000)]
    parts = [PACKED[packed](lines([{"text": text} for text in written[i : i + 2_000]])) for i in range(0, 8_000, 2_000)]
    whole = (SKIPPABLE if packed == ".zst" else b"").join(parts)
    for size in (len(whole), len(whole) * 9 // 10):
        (tmp_path / f"a.jsonl{packed}").write_bytes(whole[:size])
        left_out = LeftOut(OnBadRecord.skip)
        found = texts(local(tmp_path, f"a.jsonl{packed}"), left_out)
        assert found == written[: len(found)] and len(found) > 6_000
        assert (len(found) == len(written), left_out.count) == ((True, 0) if size == len(whole) else (False, 1))


def test_longest_window_of_zstandard(tmp_path: Path) -> None:
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=31)
    frame = zstandard.ZstdCompressor(compression_params=settings).compressobj()  # as zstd --long=31 of a pipe
    (tmp_path / "a.jsonl.zst").write_bytes(frame.compress(lines(RECORDS)) + frame.flush())
    assert texts(local(tmp_path, "a.jsonl.zst")) == TEXTS


def test_odd_characters_are_kept(tmp_path: Path) -> None:
    """Case 47."""
    kept = ["a\0b", "crlf\r\nline\r", "\ufeff in \ufeff", "a\u2028\x85b", "\U0010ffff 👩‍👩‍👧", " \t lead", "ends \n\n"]
    records, mark = [{"text": text} for text in kept], b"\xef\xbb\xbf"  # the byte-order mark
    windows = mark + b"\r\n".join(lines(records).splitlines()) + b"\r\n\n \n"
    array = mark + b" \n" + json.dumps(records, indent=1).encode()
    files = {"a.jsonl": windows, "b.json": array, "c.parquet": parquet(records), "d.txt": mark + b"one\r\ntwo\0"}
    write(tmp_path, files)
    for name in files:
        assert texts(local(tmp_path, name)) == (["one\r\ntwo\0"] if name == "d.txt" else kept)


def test_sources_are_folders_a_key_or_named(tmp_path: Path) -> None:
    records = {folder: {"text": folder, "meta": {"set": "C++"}} for folder in ("en", "code/deep")}
    write(tmp_path / "texts", {f"{folder}/a.jsonl": lines([record]) for folder, record in records.items()})
    (tmp_path / "texts" / "b.jsonl").write_bytes(lines([{"text": "on top"}]))
    for pattern in ("texts", "texts/**/*.jsonl"):
        assert {d.source for d in read(local(tmp_path, pattern))} == {"en", "code", "mine"}
    assert {d.source for d in read(local(tmp_path, "texts", source_key="meta.set"))} == {"C++", "mine"}
    sources = {"Code": str(tmp_path / "texts" / "[cd]*" / "*" / "a.jsonl"), "top": str(tmp_path / "texts" / "b.jsonl")}
    found = read(local(tmp_path, "none", input=None, sources=sources))
    assert [(d.text, d.source) for d in found] == [("on top", "top"), ("code/deep", "Code")]


@pytest.mark.parametrize("pattern", ["in", "in/**/*.jsonl", "in/[a-z]*/a.jsonl"])
def test_links_are_followed_once(tmp_path: Path, pattern: str) -> None:
    write(tmp_path, {"in/en/a.jsonl": lines([{"text": "en"}]), "big/a.jsonl": lines([{"text": "big"}])})
    links = {"de": "../big", "back": ".", "fr": "../big", "b.jsonl": "en/a.jsonl", "gone": "../nothing", "en/up": ".."}
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(target)
    items = list_items(local(tmp_path, pattern))
    assert [(item.source, Path(item.path).name) for item in items] == [("de", "a.jsonl"), ("en", "a.jsonl")]


@pytest.mark.parametrize("name", ["notes [2024].jsonl", "a*b/x.jsonl", "[ab]/[c].jsonl"])
def test_existing_path_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / "in [1]" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(lines([{"text": "x"}]))
    monkeypatch.chdir(tmp_path / "in [1]")
    patterns = [name, str(path), "*.jsonl" if path.parent == Path.cwd() else f"{Path(name).parent}/*.jsonl", "."]
    for pattern in patterns:
        assert [item.path for item in list_items(local(tmp_path, "", input=pattern))] == [str(path)]


def test_settings_of_each_source(tmp_path: Path) -> None:
    chinese = {
        "zh/a.jsonl": lines([{"body": "中文", "meta": {"set": "book"}}]),
        "zh/held.jsonl": lines([{"body": "留出"}]),
    }
    docs = {"docs/a.md": b"# title", "docs/b.tex": b"one\n\ntwo\n"}
    write(tmp_path, {"en/a.jsonl": lines([{"text": "english", "body": "no"}]), **chinese, **docs})
    sources: dict[str, Any] = {
        "plain": f"{tmp_path}/en/a.jsonl",
        "zh": {"input": [f"{tmp_path}/zh/a.jsonl"], "text_key": "body", "valid_input": f"{tmp_path}/zh/held.jsonl"},
        "docs": {"input": f"{tmp_path}/docs", "text_suffixes": [".tex"], "text_lines": True},
    }
    config = local(tmp_path, "none", input=None, sources=sources, valid_fraction=0.0)
    found = [f"{d.text} {d.source} {d.split}" for d in read(config)]
    assert found == ["留出 zh valid", "one docs train", "two docs train", "english plain train", "中文 zh train"]


def test_listed_hidden_and_ignored_files(tmp_path: Path) -> None:
    names = ("a.csv", "b.CSV.gz", "README", "a.TXT", "a.py", "d.HTM.gz", ".a.txt", ".git/a.txt")
    packed = {name: PACKED[name[-3:] if name.endswith(".gz") else ""] for name in names}
    write(tmp_path / "texts", {name: pack(name.encode()) for name, pack in packed.items()})
    folder = str(tmp_path / "texts")
    both = [f"{folder}/*.py", folder, f"{folder}/a.TXT"]
    (tmp_path / "texts" / "gone.txt").symlink_to("nowhere")
    for inputs in (both, both[::-1], f"{folder}/[!.]*", f"file://{folder}"):
        ignored: Counter[str] = Counter()
        items = list_items(local(tmp_path, "", input=inputs), ignored)
        assert [Path(item.path).name for item in items] == ["a.TXT", "a.py", "d.HTM.gz"]
        assert ignored[".csv"] >= 2 and ignored["without a suffix"] == ignored["broken links"] == 1
    assert texts(local(tmp_path, "texts/.a.txt")) == [".a.txt"], "a hidden file that is named is read"
    assert texts(local(tmp_path, "texts", text_suffixes=[".csv"])) == ["a.csv", "b.CSV.gz"]
    with pytest.raises(DataError, match=r"data.input \(.*/a.TXT\) has no readable file"):
        read(local(tmp_path, "", input=both, text_suffixes=[".py"]))


@pytest.mark.parametrize(
    ("key", "address"), [("input", "memory://nothing"), ("input", "none/*.jsonl"), ("valid_input", "nowhere://x")]
)
def test_missing_input_is_named(tmp_path: Path, key: str, address: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=rf"data.{key} \({address.replace('*', '.')}\)"):
        read(local(tmp_path, "a.txt", **{key: address}))


def test_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(path: str) -> Any:
        raise PermissionError(13, "Permission denied", path)

    (tmp_path / "in").mkdir()
    with monkeypatch.context() as patch, pytest.raises(DataError, match=r"data.input .*listed: .*denied: .*in'"):
        patch.setattr("os.scandir", scandir)
        read(local(tmp_path, "in"))


def test_fsspec_address_is_read(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setattr("corpus.units.LEAST_UNIT_BYTES", 500)
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/en/a.jsonl.gz", gzip.compress(lines(RECORDS[:30])))
    store.pipe("/bucket/code/b.jsonl", lines(RECORDS[30:50]))
    store.pipe("/bucket/code/c.parquet.zst", PACKED[".zst"](parquet(RECORDS[50:])))
    for address in ("memory://bucket", "memory://bucket/**/*"):
        found = read(local(tmp_path, "none", input=address))
        assert sorted(d.text for d in found) == sorted(TEXTS)
        assert {d.source for d in found} == {"en", "code"}
    assert n_documents(made(local(tmp_path, "none", input="memory://bucket"), tokenizer)) == len(RECORDS)


def test_builtin_text_keeps_files_together(tmp_path: Path) -> None:
    config = local(tmp_path, "none", source=Source.builtin, input=None, valid_fraction=0.3)
    items = [item for item in list_items(config) if Path(item.path).name in ("argparse.py", "ast.py", "topics.py")]
    splits: dict[str, set[str]] = {}
    for document in (d for item in items for d in Reader(config).documents(item, LeftOut(OnBadRecord.error))):
        splits.setdefault(document.place.split(":")[0], set()).add(document.split)
    assert len(splits["argparse.py"]) == len(splits["ast.py"]) == 1 and len(splits["pydoc_data/topics.py"]) == 2
