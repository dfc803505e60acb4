"""Every format is read, whole and by ranges; what cannot be read is named and left out alone."""

import bz2
import gzip
import io
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
from omegaconf.errors import OmegaConfBaseException

from corpus import readers
from corpus.config import DataError, OnBadRecord, Source, Style
from corpus.inputs import Item, describe_ignored, list_items
from corpus.left_out import LeftOut
from corpus.readers import Lines, Reader, records_of
from corpus.units import plan_units
from data.config import DataConfig
from data.tokenizer import Tokenizer
from tests.corpora import PACKED, PLAIN, RECORDS, lines, local, made, parquet, read, read_with


def read_units(config: DataConfig, left_out: LeftOut) -> list[str]:
    """Return the texts of a corpus, read unit after unit by one reader."""
    items, reader = list_items(config), Reader(config)
    spans = [span for unit in plan_units(items, config) for span in unit.spans]
    found = [d for s in spans for d in reader.documents(items[s.item], left_out, s.start, s.stop)]
    reader.close()
    return [document.text for document in found]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("plain", PLAIN)
def test_every_format_has_the_same_documents(
    tmp_path: Path, plain: str, packed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "READ_BYTES", 100)  # records lie across reads
    monkeypatch.setattr("corpus.units.LEAST_UNIT_BYTES", 150)
    name, texts = f"a{plain}{packed}", [record["text"] for record in RECORDS]
    (tmp_path / name).write_bytes(PACKED[packed](PLAIN[plain](RECORDS)))
    config = local(tmp_path, name, source_key="meta.set")
    assert [d.text for d in read(config)] == texts == read_units(config, LeftOut(OnBadRecord.error))
    assert [d.source for d in read(config)] == [record["meta"]["set"] for record in RECORDS]


@pytest.mark.parametrize("packed", PACKED)
def test_text_is_one_document_or_one_per_line(tmp_path: Path, packed: str) -> None:
    (tmp_path / f"a.txt{packed}").write_bytes(PACKED[packed](b"one\n\n  two\n"))
    assert [d.text for d in read(local(tmp_path, f"a.txt{packed}"))] == ["one\n\n  two\n"]
    assert [d.text for d in read(local(tmp_path, f"a.txt{packed}", text_lines=True))] == ["one", "two"]


@given(
    st.lists(st.integers(0, 60), max_size=30), st.lists(st.integers(0, 900), max_size=5), st.booleans(),
    st.integers(1, 50), st.sampled_from(["", ".gz"]), st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_ranges_share_lines_out(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    cuts: list[int],
    ended: bool,
    block: int,
    packed: str,
    anew: bool,
) -> None:
    """Every line is in one range, the one that it begins in, whether or not the file is opened anew for each."""
    text = b"".join(b"%d" % (k % 10) * size + b"\n" for k, size in enumerate(sizes)) + b"last" * (not ended)
    path = tmp_path_factory.mktemp("lines") / f"a.jsonl{packed}"
    path.write_bytes(PACKED[packed](text))
    limits = [0, *sorted(cuts), readers.END]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "READ_BYTES", block)
        found, reader = b"", Lines(str(path))
        for start, stop in itertools.pairwise(limits):
            if anew:
                reader.file.close()
                reader = Lines(str(path))
            for at, chunk in reader.read(start, stop):
                assert chunk is not None and at == len(found) and text[at:].startswith(chunk)
                begins = [at, *(at + k + 1 for k, byte in enumerate(chunk[:-1]) if byte == 10)]
                assert all(start <= place < stop for place in begins)
                found += chunk
        reader.file.close()
    assert found == text


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.txt"])
def test_document_above_the_limit_is_bad_record(tmp_path: Path, name: str) -> None:
    """Case 47."""
    records = [{"text": "before"}, {"text": "x" * (1 << 20)}, {"text": "y" * (1 << 20) + "y"}, {"text": "after"}]
    plain, packed = "." + name.split(".")[1], name.partition(".")[2].partition(".")[1:]
    content = b"z" * (1 << 21) if plain == ".txt" else PLAIN[plain](records)
    (tmp_path / name).write_bytes(gzip.compress(content) if packed[1] else content)
    left_out = LeftOut(OnBadRecord.skip)
    config = local(tmp_path, name, max_document_mb=1)
    found = [len(d.text) for d in read_with(config, left_out)]
    # of a line the limit is that of its JSON
    assert found == {".txt": [], ".jsonl": [6, 5]}.get(plain, [6, 1 << 20, 5])
    assert left_out.count == {".jsonl": 2}.get(plain, 1) and all("max_document_mb" in p for p in left_out.places)


def test_raw_json_keeps_the_syntax(tmp_path: Path) -> None:
    """As InternLM encoded it."""
    (tmp_path / "a.jsonl").write_bytes(lines(RECORDS))
    (tmp_path / "a.json").write_bytes(json.dumps([{"text": "今天"}]).encode())
    for key in (None, "meta.set"):
        found = read(local(tmp_path, "a.jsonl", raw_json=True, source_key=key))
        assert [d.text for d in found] == lines(RECORDS).decode().splitlines(keepends=True)
    assert found[0].source == "C++"
    assert [d.text for d in read(local(tmp_path, "a.json", raw_json=True))] == ['{"text": "\\u4eca\\u5929"}']
    pq.write_table(pyarrow.table({"text": ["a", "b"], "raw": [b"x", None]}), tmp_path / "a.parquet")
    left_out = LeftOut(OnBadRecord.skip)
    found = read_with(local(tmp_path, "a.parquet", raw_json=True), left_out)
    assert [d.text for d in found] == ['{"text": "b", "raw": null}'] and "a.parquet[0]" in left_out.places[0]


BAD = [
    ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "a.jsonl:2: "),
    ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl:1: "),
    ("a.jsonl", b'{"body": "x"}\n', r"a.jsonl:1: data.text_key \(text\).* body"),
    ("a.jsonl", b'{"text": 3}\n', r"data.text_key \(text\).* int"),
    ("a.jsonl", b'["text"]\n', r"data.text_key \(text\).* list"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "surrogate"),
    ("a.jsonl", b"[" * 100_000 + b"\n", "a.jsonl:1: "),
    ("a.json", b'{"text": "x"}', "list of records"),
    ("a.json", b'[{"text": "x"}, {"text": }]', "a.json: not JSON"),
    ("a.json", b'[{"text": "\xff"}]', "a.json: not JSON"),
    ("a.json", b'[{"text": "x"}, {"body": "x"}]', r"a.json\[1\]: data.text_key"),
    ("a.jsonl.gz", gzip.compress(lines(RECORDS))[:-20], "damaged"),
    ("a.jsonl.gz", b"not gzip", "damaged"),
    ("a.jsonl.zst", zstandard.compress(lines(RECORDS))[:-9], "damaged"),
    ("a.jsonl.xz", lzma.compress(lines(RECORDS))[:-40], "damaged"),
    ("a.jsonl.bz2", bz2.compress(lines(RECORDS))[:-40], "damaged"),
    ("a.jsonl.bz2", b"not bzip2", "damaged"),
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
    read_with(local(tmp_path, name), left_out)
    assert left_out.count == len(left_out.places) == 1


def test_other_records_and_files_are_read(tmp_path: Path) -> None:
    mixed: list[Any] = [{"text": "a"}, {"content": "b"}, {"text": ["c"]}, {"text": " "}, "d", {"text": "e", "meta": 3}]
    (tmp_path / "a.jsonl").write_bytes(lines(mixed) + b"{\n" * 20)
    (tmp_path / "b.parquet").write_bytes(parquet([{"body": "g"}]))
    (tmp_path / "c.parquet").write_bytes(parquet([{"text": "h"}, {"text": None}]))
    (tmp_path / "d.jsonl").write_bytes(b"\n \n")
    left_out = LeftOut(OnBadRecord.skip)
    assert [d.text for d in read_with(local(tmp_path, "*"), left_out)] == ["a", "e", "h"]
    assert left_out.count == 25 and left_out.empty == 1
    assert [place.split(": ")[0][-1:] for place in left_out.places[:4]] == ["2", "3", "5", "7"]
    assert len(left_out.places) == 10


def test_place_of_a_later_range_is_its_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corpus.units.LEAST_UNIT_BYTES", 200)
    before = lines(RECORDS[:20])
    (tmp_path / "a.jsonl").write_bytes(before + b"{\n" + lines(RECORDS[20:]))
    left_out = LeftOut(OnBadRecord.skip)
    assert len(read_units(local(tmp_path, "a.jsonl"), left_out)) == len(RECORDS)
    assert left_out.places[0].startswith(f"{tmp_path}/a.jsonl: line at byte {len(before)}: ")


@pytest.mark.parametrize("packed", [kind for kind in PACKED if kind])
def test_lines_before_the_damage_are_read(tmp_path: Path, packed: str) -> None:
    texts = [f"{i} " + str(hash((i, "x")) ** 9) for i in range(30_000)]
    raw = PACKED[packed](lines([{"text": text} for text in texts]))
    (tmp_path / f"a.jsonl{packed}").write_bytes(raw[: len(raw) * 9 // 10])
    left_out = LeftOut(OnBadRecord.skip)
    found = [d.text for d in read_with(local(tmp_path, f"a.jsonl{packed}"), left_out)]
    assert found == texts[: len(found)] and len(found) > 10_000 and left_out.count == 1


def test_odd_characters_are_kept(tmp_path: Path) -> None:
    """Case 47."""
    texts = ["a\0b", "crlf\r\nline\r", "\ufeff in \ufeff", "a\u2028\x85b", "\U0010ffff 👩‍👩‍👧", " \t lead", "ends \n\n"]
    records = [{"text": text} for text in texts]
    raw = b"\xef\xbb\xbf" + b"\r\n".join(line for line in lines(records).splitlines()) + b"\r\n\n \n"
    (tmp_path / "a.jsonl").write_bytes(raw)  # with a byte-order mark, Windows' line ends and blank lines
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf \n" + json.dumps(records, indent=1).encode())
    (tmp_path / "c.parquet").write_bytes(parquet(records))
    for name in ("a.jsonl", "b.json", "c.parquet"):
        assert [d.text for d in read(local(tmp_path, name))] == texts
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\0")
    assert [d.text for d in read(local(tmp_path, "d.txt"))] == ["one\r\ntwo\0"]


def test_sources_are_folders_a_key_or_named(tmp_path: Path) -> None:
    for folder in ("en", "code/deep"):
        (tmp_path / "texts" / folder).mkdir(parents=True)
        (tmp_path / "texts" / folder / "a.jsonl").write_bytes(lines([{"text": folder, "meta": {"set": "C++"}}]))
    (tmp_path / "texts" / "b.jsonl").write_bytes(lines([{"text": "on top"}]))
    for pattern in ("texts", "texts/**/*.jsonl"):
        assert {d.source for d in read(local(tmp_path, pattern))} == {"en", "code", "mine"}
    assert {d.source for d in read(local(tmp_path, "texts", source_key="meta.set"))} == {"C++", "mine"}
    sources = {"Code": str(tmp_path / "texts" / "[cd]*" / "*" / "a.jsonl"), "top": str(tmp_path / "texts" / "b.jsonl")}
    found = read(local(tmp_path, "none", input=None, sources=sources))
    assert [(d.text, d.source) for d in found] == [("on top", "top"), ("code/deep", "Code")]


@pytest.mark.parametrize("pattern", ["in", "in/**/*.jsonl", "in/*/*.jsonl", "in/[a-z]*/a.jsonl"])
def test_links_to_folders_are_followed_and_each_file_read_once(tmp_path: Path, pattern: str) -> None:
    for folder in ("in/en", "big"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.jsonl").write_bytes(lines([{"text": folder}]))
    links = {"de": "../big", "back": ".", "fr": "../big", "b.jsonl": "en/a.jsonl", "gone": "../nothing", "en/up": ".."}
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(target)
    ignored: Counter[str] = Counter()
    items = list_items(local(tmp_path, pattern), ignored)
    assert [(item.source, Path(item.path).name) for item in items] == [("de", "a.jsonl"), ("en", "a.jsonl")]
    if pattern == "in":
        assert ignored == {"links back to a folder they are in": 2, "broken links": 1}
        assert describe_ignored(ignored) == "not read: 2 links back to a folder they are in, 1 broken links"


@pytest.mark.parametrize("name", ["notes [2024].jsonl", "what?.jsonl", "a*b/x.jsonl", "[ab]/[c].jsonl", "**/x.jsonl"])
def test_path_that_exists_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / "in [1]" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(lines([{"text": "x"}]))
    monkeypatch.chdir(tmp_path / "in [1]")
    patterns = [name, str(path), "*.jsonl" if path.parent == Path.cwd() else f"{Path(name).parent}/*.jsonl", "."]
    for pattern in patterns:
        assert [item.path for item in list_items(local(tmp_path, "", input=pattern))] == [str(path)]


def test_each_source_is_read_by_its_own_settings(tmp_path: Path) -> None:
    contents = {
        "en/a.jsonl": lines([{"text": "english", "body": "no"}]),
        "zh/a.jsonl": lines([{"body": "中文", "meta": {"set": "book"}}]),
        "zh/held.jsonl": lines([{"body": "留出"}]),
        "docs/a.md": b"# title",
        "docs/b.tex": b"one\n\ntwo\n",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    path = {name.replace(".", "_"): str(tmp_path / name) for name in contents}
    sources: dict[str, Any] = {
        "plain": path["en/a_jsonl"],
        "zh": {"input": [path["zh/a_jsonl"]], "text_key": "body", "valid_input": path["zh/held_jsonl"]},
        "docs": {"input": str(tmp_path / "docs"), "text_suffixes": [".tex"], "text_lines": True},
    }
    config = local(tmp_path, "none", input=None, sources=sources, valid_fraction=0.0)
    expected = [
        ("留出", "zh", "valid"), ("one", "docs", "train"), ("two", "docs", "train"), ("english", "plain", "train"),
        ("中文", "zh", "train"),
    ]  # fmt: skip
    assert [(d.text, d.source, d.split) for d in read(config)] == expected
    for wrong, named in (({"text_kee": "x"}, "sources.zh.text_kee"), ({"text_lines": 3.5}, "sources.zh.text_lines")):
        config.sources = {"zh": {"input": "x", **wrong}}
        with pytest.raises(OmegaConfBaseException, match=f"full_key: data.{named}"):
            list_items(config)


def test_list_of_inputs_is_read_without_copies_in_any_order(tmp_path: Path) -> None:
    for name in ("a.md", "b.rst", "c.html", "d.HTM.gz", "e.py", "f.tex"):
        (tmp_path / name).write_bytes(gzip.compress(name.encode()) if name.endswith("gz") else name.encode())
    both = [str(tmp_path / "*.py"), str(tmp_path), str(tmp_path / "a.md")]
    for inputs in (both, both[::-1]):
        assert [d.text for d in read(local(tmp_path, "", input=inputs))] == [
            "a.md",
            "b.rst",
            "c.html",
            "d.HTM.gz",
            "e.py",
        ]
    assert [d.text for d in read(local(tmp_path, "", input=both[1], text_suffixes=[".tex"]))] == ["f.tex"]
    with pytest.raises(DataError, match=r"data.input \(.*/a.md\) has no readable file"):
        read(local(tmp_path, "", input=both, text_suffixes=[".py"]))


def test_hidden_files_are_skipped_and_other_formats_counted(tmp_path: Path) -> None:
    (tmp_path / "texts" / ".git").mkdir(parents=True)
    names = [
        "a.csv",
        "b.CSV.gz",
        "a.jsonl.lz4",
        "README",
        "a.TXT",
        "a.txt",
        ".a.txt",
        ".git/a.txt",
        "a.1",
        "a.2",
        "a.3",
    ]
    for name in names:
        (tmp_path / "texts" / name).write_text(name)
    (tmp_path / "blob").write_bytes(gzip.compress(lines(RECORDS[:1])))
    (tmp_path / "texts" / "b.JSONL.GZ").symlink_to(tmp_path / "blob")
    for pattern in ("texts", "texts/[!.]*", f"file://{tmp_path}/texts"):
        ignored: Counter[str] = Counter()
        config = local(tmp_path, pattern) if "://" not in pattern else local(tmp_path, "none", input=pattern)
        assert [Path(item.path).name for item in list_items(config, ignored)] == ["a.TXT", "a.txt", "b.JSONL.GZ"]
        assert describe_ignored(ignored).endswith("1 without a suffix, 2 .csv, 1 .1, 1 .2, 1 .3, ...")
    assert len(read(local(tmp_path, "texts/.a.txt"))) == 1, "a hidden file that is named is read"
    assert describe_ignored(Counter()) == ""


@pytest.mark.parametrize(
    ("key", "address"),
    [("input", "memory://nothing"), ("input", "none/*.jsonl"), ("valid_input", "nowhere://x"), ("valid_input", "gone")],
)
def test_input_that_is_not_there_is_named(tmp_path: Path, key: str, address: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=rf"data.{key} \({address.replace('*', '.')}\)"):
        read(local(tmp_path, "a.txt", **{key: address}))


def test_fsspec_address_is_read(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setattr("corpus.units.LEAST_UNIT_BYTES", 500)
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/en/a.jsonl.gz", gzip.compress(lines(RECORDS[:30])))
    store.pipe("/bucket/code/b.jsonl", lines(RECORDS[30:50]))
    store.pipe("/bucket/code/c.parquet.zst", PACKED[".zst"](parquet(RECORDS[50:])))
    for address in ("memory://bucket", "memory://bucket/**/*"):
        found = read(local(tmp_path, "none", input=address))
        assert sorted(d.text for d in found) == sorted(record["text"] for record in RECORDS)
        assert {d.source for d in found} == {"en", "code"}
    about = made(local(tmp_path, "none", input="memory://bucket"), tokenizer)
    assert sum(counts["documents"] for split in about["splits"].values() for counts in split.values()) == len(RECORDS)


def test_parquet_of_any_layout_is_read(tmp_path: Path) -> None:
    """Dictionary columns, large strings, cells that are not UTF-8, columns that are missing for some."""
    texts = ["a", "b", "c" * 5000, "d", "b"]
    for kind in (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        table = pyarrow.table({"text": pyarrow.array(texts).cast(kind), "other": [1] * 5})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
        assert [d.text for d in read(local(tmp_path, "a.parquet", source_key="meta.set"))] == texts
    raw = pyarrow.array([b"abc", b"d\xff", b"f"], pyarrow.binary())
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    pq.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    left_out = LeftOut(OnBadRecord.skip)
    assert [d.text for d in read_with(local(tmp_path, "a.parquet"), left_out)] == ["abc", "f"]
    assert left_out.count == 1 and "a.parquet[1]" in left_out.places[0]


def test_json_in_cells_is_parsed() -> None:
    """Hugging Face's datasets store records that differ in shape as JSON."""
    parts = [pyarrow.array(["user"]), pyarrow.array(['"hi"'], pyarrow.json_())]
    turn = pyarrow.StructArray.from_arrays(parts, ["role", "content"])
    meta = pyarrow.array(['{"set": "x"}', None, '["y"]'], pyarrow.json_())
    turns = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, None, 1], pyarrow.int32()), turn)
    assert records_of(pyarrow.RecordBatch.from_arrays([meta, turns], ["meta", "turns"])) == [
        {"meta": {"set": "x"}, "turns": [{"role": "user", "content": "hi"}]},
        {"meta": None, "turns": []},
        {"meta": ["y"], "turns": None},
    ]


def test_damaged_row_group_is_bad_record(tmp_path: Path) -> None:
    file, texts = io.BytesIO(), [f"{i} {hash((i, 'y')) ** 5}" for i in range(30)]
    pq.write_table(pyarrow.table({"text": texts}), file, row_group_size=10)
    raw = bytearray(file.getvalue())
    start = pq.ParquetFile(io.BytesIO(raw)).metadata.row_group(1).column(0).dictionary_page_offset
    raw[start + 4 : start + 300] = bytes(296)
    (tmp_path / "a.parquet").write_bytes(raw)
    left_out = LeftOut(OnBadRecord.skip)
    assert [d.text for d in read_with(local(tmp_path, "a.parquet"), left_out)] == texts[:10]
    assert left_out.count == 1 and "a.parquet" in left_out.places[0]


def test_builtin_text_keeps_files_together(tmp_path: Path) -> None:
    config = local(tmp_path, "none", source=Source.builtin, input=None, valid_fraction=0.3)
    items = [item for item in list_items(config) if Path(item.path).name in ("argparse.py", "ast.py", "topics.py")]
    reader, left_out = readers.Reader(config), LeftOut(OnBadRecord.error)
    splits: dict[str, set[str]] = {}
    for document in (document for item in items for document in reader.documents(item, left_out)):
        splits.setdefault(document.place.split(":")[0], set()).add(document.split)
    assert len(splits["argparse.py"]) == len(splits["ast.py"]) == 1 and len(splits["pydoc_data/topics.py"]) == 2


def test_missing_file_is_named(tmp_path: Path) -> None:
    config = local(tmp_path, "none", style=Style.text)
    with pytest.raises(DataError, match=r"gone.jsonl cannot be read"):
        list(Reader(config).documents(Item(str(tmp_path / "gone.jsonl"), "s"), LeftOut(OnBadRecord.skip)))
