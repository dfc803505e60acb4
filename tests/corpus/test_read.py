"""Every format is read, and what cannot be is named and lost alone."""

import bz2
import gzip
import json
import lzma
import random
from itertools import islice
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import read as reading
from corpus.builtin import builtin_documents
from corpus.config import DataError, OnBadRecord
from corpus.inputs import BadRecords, Item, source_name
from corpus.texts import all_documents
from data.shards import Shard
from data.tokenizer import Tokenizer
from tests.corpora import PACKED, PLAIN, RECORDS, lines, local, made, parquet, read


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("plain", PLAIN)
def test_every_format_gives_the_same_documents(
    tmp_path: Path, plain: str, packed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 100)  # records lie across blocks
    name = f"a{plain}{packed}"
    (tmp_path / name).write_bytes(PACKED[packed](PLAIN[plain](RECORDS)))
    assert [d.text for d in read(local(tmp_path, name))] == [record["text"] for record in RECORDS]
    sources = [d.source for d in read(local(tmp_path, name, source_key="meta.set"))]
    assert sources == [source_name(record["meta"]["set"]) for record in RECORDS]


@pytest.mark.parametrize("packed", PACKED)
def test_a_text_is_one_document_or_one_a_line(tmp_path: Path, packed: str) -> None:
    (tmp_path / f"a.txt{packed}").write_bytes(PACKED[packed](b"one\n\n  two\n"))
    assert [d.text for d in read(local(tmp_path, f"a.txt{packed}"))] == ["one\n\n  two\n"]
    assert [d.text for d in read(local(tmp_path, f"a.txt{packed}", text_lines=True))] == ["one", "two"]


def test_raw_json_is_the_line_with_its_syntax_as_internlm_encoded_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(RECORDS))
    (tmp_path / "a.json").write_bytes(json.dumps([{"text": "今天"}]).encode())
    texts = [d.text for d in read(local(tmp_path, "a.jsonl", raw_json=True))]
    assert texts == lines(RECORDS).decode().splitlines(keepends=True)
    assert [d.text for d in read(local(tmp_path, "a.json", raw_json=True))] == ['{"text": "\\u4eca\\u5929"}']


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=9)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)


@given(st.lists(JSON, max_size=12), st.integers(1, 40), st.sampled_from([None, 1, 3]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_list_of_any_json_is_read_in_parts_as_it_is_read_whole(
    tmp_path_factory: pytest.TempPathFactory, records: list, block: int, indent: int | None, ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("j") / "a.json"
    path.write_text(
        json.dumps(records, indent=indent, ensure_ascii=ascii_only), encoding="utf-8", errors="surrogatepass"
    )
    before, reading.BLOCK_BYTES = reading.BLOCK_BYTES, block
    try:
        config, bad = local(path.parent, "a.json"), BadRecords(OnBadRecord.skip)
        item = Item(str(path), "s")
        surrogates = any(0xD800 <= ord(c) < 0xE000 for c in path.read_text("utf-8", "surrogatepass"))
        found = [record for one in reading.blocks(item, config, bad) for record in one.payload]
    finally:
        reading.BLOCK_BYTES = before
    assert surrogates or (found == records and bad.count == (not records))


def test_sources_are_folders_or_a_key(tmp_path: Path) -> None:
    for folder in ("en", "code/deep"):
        (tmp_path / "texts" / folder).mkdir(parents=True)
        (tmp_path / "texts" / folder / "a.jsonl").write_bytes(
            lines([*RECORDS[:3], {"text": folder, "meta": {"set": "C++"}}])
        )
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
    ("a.jsonl", b'{"body": "x"}\n', r"a.jsonl:1: data.text_key \(text\) is missing in it; it has body"),
    ("a.jsonl", b'{"text": 3}\n', r"data.text_key \(text\) is a number in it, not a string"),
    ("a.jsonl", b'{"text": null}\n', r"is null in it, not a string"),
    ("a.jsonl", b'{"text": ["x"]}\n', r"is a list in it, not a string"),
    ("a.jsonl", b'["text"]\n', r"is missing in it; it has list"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', r"half a surrogate pair"),
    ("a.jsonl", b"", r"a.jsonl: holds no document"),
    ("a.json", b'{"text": "x"}', r"must hold a list of records"),
    ("a.json", b'[{"text": "x"}, {"text": }]', r"a.json\[1\]: not JSON: Expecting value"),
    ("a.json", b'[{"text": "x"} {"text": "y"}]', r"a.json\[1\]: not JSON: a comma is missing"),
    ("a.json", b'[{"text": "x"}, {"text": "y', r"a.json\[1\]: not JSON: Unterminated string"),
    ("a.json", b'[{"text": "\xff"}]', r"a.json\[0\]: not UTF-8"),
    ("a.jsonl.gz", gzip.compress(lines(RECORDS))[:-20], r"damaged or cut short"),
    ("a.jsonl.gz", b"not gzip", r"this is no gzip file, as its suffix \(.gz\) says"),
    ("a.jsonl.zst", b"not zstandard", r"this is no Zstandard file, as its suffix \(.zst\) says"),
    ("a.jsonl.zst", zstandard.compress(lines(RECORDS))[:-9], r"damaged or cut short|not JSON"),
    ("a.jsonl.xz", lzma.compress(lines(RECORDS))[:-40], r"damaged or cut short"),
    ("a.jsonl.bz2", bz2.compress(lines(RECORDS))[:-40], r"damaged or cut short"),
    ("a.jsonl.bz2", b"not bzip2", r"this is no bzip2 file, as its suffix \(.bz2\) says"),
    ("a.parquet", parquet(RECORDS)[:-9], r"a.parquet: is no Parquet file"),
    ("a.parquet", parquet([{"body": "x"}]), r"a.parquet: has no column text; it has body"),
    ("a.parquet", parquet([{"text": 3}]), r"a.parquet\[0\]: data.text_key \(text\) is a number in it, not a string"),
    ("a.txt", b"fine \xff", r"a.txt: not UTF-8 at byte 5"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), BAD, ids=range(len(BAD)))
def test_a_bad_record_is_named_or_counted(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read(local(tmp_path, name))
    bad = BadRecords(OnBadRecord.skip)
    list(all_documents(local(tmp_path, name, on_bad_record=OnBadRecord.skip), bad))
    assert bad.count >= 1 and len(bad.places) == min(bad.count, 10)


def test_no_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"names no file that can be read: it takes .txt, .json, .jsonl"):
        read(local(tmp_path, "*.jsonl"))


def test_a_split_does_not_move_when_data_is_added(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(RECORDS))
    before = {d.text: d.split for d in read(local(tmp_path, "*.jsonl"))}
    (tmp_path / "0.jsonl").write_bytes(lines([{"text": f"other {i}"} for i in range(40)]))
    after = {d.text: d.split for d in read(local(tmp_path, "*.jsonl"))}
    assert before.items() <= after.items() and set(before.values()) == {"train", "valid"}


def test_sources_may_be_named_one_by_one(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([{"text": name}]))
    sources = {"Code": str(tmp_path / "[ab].jsonl"), "en": str(tmp_path / "c.jsonl")}
    found = read(local(tmp_path, "none", input=None, sources=sources))
    assert [(d.text, d.source) for d in found] == [("a", "code"), ("b", "code"), ("c", "en")]


def test_a_copy_of_a_file_is_told(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(lines(RECORDS))
    with pytest.raises(DataError, match=r"b.jsonl: has the same bytes as .*a.jsonl"):
        read(local(tmp_path, "*.jsonl"))
    assert len(read(local(tmp_path, "*.jsonl", on_bad_record=OnBadRecord.skip))) == len(RECORDS)


def test_an_object_store_is_read_through_fsspec(tmp_path: Path, tokenizer: Tokenizer) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for name, records in (("en/a.jsonl.gz", RECORDS[:30]), ("code/b.jsonl.gz", RECORDS[30:])):
        store.pipe(f"/bucket/{name}", gzip.compress(lines(records)))
    for address in ("memory://bucket", "memory://bucket/**/*.gz"):
        found = read(local(tmp_path, "none", input=address))
        assert sorted(d.text for d in found) == sorted(record["text"] for record in RECORDS)
        assert {d.source for d in found} == {"en", "code"}
    about = made(local(tmp_path, "none", input="memory://bucket"), tokenizer)
    assert sum(counts["documents"] for split in about["splits"].values() for counts in split.values()) == len(RECORDS)
    with pytest.raises(DataError, match=r"data.input \(memory://nothing\)"):
        read(local(tmp_path, "none", input="memory://nothing"))


def test_a_text_too_long_to_hold_has_the_ids_of_the_whole(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(record["text"] for record in RECORDS) * 3 + "ende\u0301 今天\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_text("another", encoding="utf-8")
    monkeypatch.setattr(reading, "TEXT_BYTES", 100)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 70)
    monkeypatch.setattr("corpus.long.PIECE_CHARS", 50)
    config = local(tmp_path, "*.txt", valid_fraction=0.0)
    about = made(config, tokenizer)
    shard = Shard(Path(config.path) / about["splits"]["train"]["mine"]["shards"][0], verify=True)
    assert shard.n_documents == 2 and about["splits"]["train"]["mine"]["text_bytes"] == len((text + "another").encode())
    assert shard.document(0).tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\xff")
    with pytest.raises(DataError, match="a.txt: not UTF-8"):
        read(config)


def test_the_builtin_text_is_the_same_each_time_and_keeps_files_together() -> None:
    documents, size = [], 0
    for document in builtin_documents():
        documents.append(document)
        size += len(document.text)
        if size > 2e6:
            break
    assert size > 2e6 and {document.source for document in documents} == {"code", "en"}
    assert [d.place for d in documents[:300]] == [d.place for d in islice(builtin_documents(), 300)]
    docstring = next(d for d in documents if d.source == "en" and d.place.startswith("argparse.py"))
    source = next(d for d in documents if d.source == "code" and d.place == "argparse.py")
    assert docstring.key == source.key


def test_odd_characters_come_through_as_they_are(tmp_path: Path) -> None:
    texts = [
        "a\0b",
        "crlf\r\nline\r",
        "\ufeff within \ufeff",
        "a\u2028\u2029\x85b",
        "\U0010ffff 👩‍👩‍👧",
        " \t lead",
        "ends \n\n",
    ]
    records = [{"text": text} for text in texts]
    raw = b"\xef\xbb\xbf" + b"\r\n".join(line for line in lines(records).splitlines()) + b"\r\n\n \n"
    (tmp_path / "a.jsonl").write_bytes(raw)  # with a byte-order mark, Windows' line ends and blank lines
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf \n" + json.dumps(records, indent=1).encode())
    (tmp_path / "c.parquet").write_bytes(parquet(records))
    for name in ("a.jsonl", "b.json", "c.parquet"):
        assert [d.text for d in read(local(tmp_path, name))] == texts
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\0")
    assert [d.text for d in read(local(tmp_path, "d.txt"))] == ["one\r\ntwo\0"]


def test_empty_documents_are_counted_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": text} for text in ("", "x", " \n\t", "y")]))
    bad = BadRecords(OnBadRecord.error)
    assert [d.text for d in all_documents(local(tmp_path, "a.jsonl"), bad)] == ["x", "y"]
    assert (bad.empty, bad.count) == (2, 0)


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_a_file_without_a_document_is_told_even_after_others(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{\n" + lines(RECORDS[:1]))
    (tmp_path / "b.jsonl").write_bytes(content)
    bad = BadRecords(OnBadRecord.skip)
    assert len(list(all_documents(local(tmp_path, "*.jsonl", on_bad_record=OnBadRecord.skip), bad))) == 1
    assert bad.places[0].startswith(f"{tmp_path}/a.jsonl:1: not JSON")
    assert content or bad.places[1] == f"{tmp_path}/b.jsonl: holds no document"


def test_records_and_files_of_another_shape_are_told_and_the_others_are_read(tmp_path: Path) -> None:
    mixed = [{"text": "a"}, {"content": "b"}, {"text": ["c"]}, {"text": None}, "d", {"text": "e", "meta": 3}]
    (tmp_path / "a.jsonl").write_bytes(lines(mixed))  # type: ignore[arg-type]
    (tmp_path / "b.parquet").write_bytes(parquet([{"text": "f", "other": 1}]))
    (tmp_path / "c.parquet").write_bytes(parquet([{"body": "g"}]))
    (tmp_path / "d.parquet").write_bytes(parquet([{"text": "h"}, {"text": None}]))
    bad = BadRecords(OnBadRecord.skip)
    config = local(tmp_path, "*", on_bad_record=OnBadRecord.skip)
    assert [d.text for d in all_documents(config, bad)] == ["a", "e", "f", "h"]
    assert bad.count == 6 and [place.split("/")[-1].split(": ")[0] for place in bad.places] == [
        "a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "a.jsonl:5", "c.parquet", "d.parquet[1]",
    ]  # fmt: skip


def test_ten_places_are_told_and_all_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{\n" * 25 + lines(RECORDS[:1]))
    bad = BadRecords(OnBadRecord.skip)
    list(all_documents(local(tmp_path, "a.jsonl", on_bad_record=OnBadRecord.skip), bad))
    assert bad.count == 25 and [place.split(":")[1] for place in bad.places] == [str(n) for n in range(1, 11)]


def test_raw_lines_have_the_source_that_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So do those that are too long to hold."""
    raw = lines(RECORDS[:9]) + lines([{"text": "x" * 900, "meta": {"set": "C++"}}])
    (tmp_path / "a.jsonl").write_bytes(raw + b"no json\n")
    config = local(tmp_path, "a.jsonl", source_key="meta.set", raw_json=True, on_bad_record=OnBadRecord.skip)
    for size in (1 << 20, 100):
        monkeypatch.setattr(reading, "BLOCK_BYTES", size)
        monkeypatch.setattr(reading, "TEXT_BYTES", size)
        bad = BadRecords(OnBadRecord.skip)
        found = list(all_documents(config, bad))
        assert "".join(d.text for d in found).encode() == raw
        assert [d.source for d in found[:9]] == [source_name(record["meta"]["set"]) for record in RECORDS[:9]]
        assert {d.source for d in found[9:]} == {"c++"} and bad.count == 1 and "a.jsonl:11: not JSON" in bad.places[0]


@pytest.mark.parametrize("packed", [kind for kind in PACKED if kind])
@pytest.mark.parametrize("plain", [".jsonl", ".json", ".txt"])
def test_of_a_file_that_is_cut_short_what_comes_before_is_read_and_the_place_is_told(
    tmp_path: Path, plain: str, packed: str
) -> None:
    draw = random.Random(0)
    records = [{"text": f"{i} " + "".join(draw.choices("abcdefghij ", k=300))} for i in range(9000)]
    raw = PACKED[packed](PLAIN.get(plain, lines)(records))
    (tmp_path / f"a{plain}{packed}").write_bytes(raw[: len(raw) * 9 // 10])
    bad = BadRecords(OnBadRecord.skip)
    found = [d.text for d in all_documents(local(tmp_path, f"a{plain}{packed}", valid_fraction=0.0), bad)]
    assert bad.count == 1 and "the compressed file is damaged or cut short here (it ends within" in bad.places[0]
    if plain == ".txt":
        assert not found, "a document without its end is none"
    else:
        place = f"{len(found) + 1}:" if plain == ".jsonl" else f"{len(found)}]:"
        assert found == [record["text"] for record in records[: len(found)]] and len(found) > 4500
        assert bad.places[0].startswith(f"{tmp_path}/a{plain}{packed}{':' if plain == '.jsonl' else '['}{place}")


@pytest.mark.parametrize("more", [b" [1]", b"{}", b"x", b" " * 3_000_000 + b"]"])
def test_what_follows_a_list_is_told(tmp_path: Path, more: bytes) -> None:
    (tmp_path / "a.json").write_bytes(json.dumps(RECORDS[:3]).encode() + b"\n" * 2_000_000)
    assert len(read(local(tmp_path, "a.json"))) == 3
    with (tmp_path / "a.json").open("ab") as file:
        file.write(more)
    bad = BadRecords(OnBadRecord.skip)
    assert len(list(all_documents(local(tmp_path, "a.json"), bad))) == 3
    assert bad.places == [
        f"{tmp_path}/a.json[3]: there is more after the list that a .json file holds; one record a line is .jsonl"
    ]


def test_what_is_not_read_is_counted_by_suffix_and_hidden_files_are_none(tmp_path: Path) -> None:
    (tmp_path / "texts" / ".git").mkdir(parents=True)
    names = ["a.csv", "b.CSV.gz", "a.jsonl.lz4", "README", "a.TXT", "a.txt", ".a.txt", ".git/a.txt"]
    for name in [*names, "a.1", "a.2", "a.3"]:
        (tmp_path / "texts" / name).write_text(name)
    (tmp_path / "texts" / "b.JSONL.GZ").write_bytes(gzip.compress(lines(RECORDS[:1])))
    for pattern in ("texts", "texts/*", f"file://{tmp_path}/texts"):
        bad = BadRecords(OnBadRecord.error)
        config = local(tmp_path, pattern) if "://" not in pattern else local(tmp_path, "none", input=pattern)
        assert [d.text for d in all_documents(config, bad)] == ["a.TXT", "a.txt", RECORDS[0]["text"]]
        assert bad.passed_over_line() == ("7 files were passed over: 2 .csv, 1 without a suffix, 1 .1, 1 .2, 1 .3, ...")
    assert len(read(local(tmp_path, "texts/.a.txt"))) == 1, "a hidden file that is named is read"
    assert BadRecords(OnBadRecord.error).passed_over_line() == ""


def test_an_address_that_cannot_be_listed_is_told_with_the_key_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"data.valid_input \(nowhere://x\) cannot be listed"):
        read(local(tmp_path, "a.txt", valid_input="nowhere://x"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.parquet.xz"])
def test_a_long_record_is_one_document_with_the_ids_of_the_whole(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    long = "".join(record["text"] for record in RECORDS) * 2 + "ende\u0301 今天\n"
    records = [
        {"text": "before"},
        {"text": "{}"},
        {"text": long},
        {"text": "after"},
        {"text": long + "!"},
        {"text": "z"},
    ]
    plain, packed = "." + name.split(".")[1], "." + name.split(".")[2] if name.count(".") == 2 else ""
    (tmp_path / name).write_bytes(PACKED[packed](PLAIN[plain](records)))
    monkeypatch.setattr(reading, "TEXT_BYTES", 400)
    monkeypatch.setattr("corpus.long.PIECE_CHARS", 300)
    monkeypatch.setattr("corpus.long.LONG_STRING", 100)
    for block in (150, 300):
        monkeypatch.setattr(reading, "BLOCK_BYTES", block)
        config = local(tmp_path, name, valid_fraction=0.0, path=str(tmp_path / f"corpus-{block}"))
        parts = [d for d in read(config) if not (d.begins and d.ends)]
        assert len(parts) > 10
        assert {d.place.split(name)[1] for d in parts} <= {":3", ":5", "[2]", "[4]"}
        about = made(config, tokenizer)
        shard = Shard(Path(config.path) / about["splits"]["train"]["mine"]["shards"][0], verify=True)
        found = [shard.document(i).tolist() for i in range(shard.n_documents)]
        assert found == [[*tokenizer.encode(record["text"]), tokenizer.eos_id] for record in records]


def test_an_address_of_this_machine_is_read(tmp_path: Path) -> None:
    (tmp_path / "en").mkdir()
    (tmp_path / "en" / "a.parquet.zst").write_bytes(PACKED[".zst"](parquet(RECORDS)))
    found = read(local(tmp_path, "none", input=f"file://{tmp_path}"))
    assert len(found) == len(RECORDS) and {d.source for d in found} == {"en"}
