"""From files to a corpus: what is read, what is refused, and what is never lost."""

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data import read as reading
from data.builtin import builtin_documents
from data.config import DataConfig, DataError, OnBadRecord, Packing, Source, TokenizerConfig
from data.corpus import open_corpus
from data.documents import Document, digest_of, split_of
from data.inputs import BadRecords, Item, source_name
from data.part import shares
from data.prepare import all_documents, existing, prepare
from data.shards import Shard, ShardWriter
from data.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent.parent
RECORDS = [
    {"text": f"Document {i}: {'word ' * (i % 7)}\n", "meta": {"set": "Wikipedia (en)" if i % 3 else "C++"}}
    for i in range(60)
]


def local(tmp_path: Path, pattern: str, **changes: object) -> DataConfig:
    config = DataConfig(
        name="mine", path=str(tmp_path / "corpora" / "mine"), source=Source.local, input=str(tmp_path / pattern),
        valid_fraction=0.2, seq_len=8, micro_batch_size=1, workers=0,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def lines(records: list[dict]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def read(config: DataConfig) -> list[Document]:
    return list(all_documents(config, BadRecords(config.on_bad_record)))


def parquet(records: list[dict]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pyarrow.Table.from_pylist(records), file, row_group_size=7)
    return file.getvalue()


PLAIN = {".jsonl": lines, ".json": lambda records: json.dumps(records).encode(), ".parquet": parquet}
PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


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
    ("a.jsonl", b'{"body": "x"}\n', r"a.jsonl:1: data.text_key \(text\) is no string in it; it has body"),
    ("a.jsonl", b'{"text": 3}\n', r"is no string"),
    ("a.jsonl", b'["text"]\n', r"is no string in it; it has list"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', r"half a surrogate pair"),
    ("a.jsonl", b"", r"a.jsonl: holds no document"),
    ("a.json", b'{"text": "x"}', r"must hold a list of records"),
    ("a.json", b'[{"text": "x"}, {"text": }]', r"a.json\[1\]: not JSON: Expecting value"),
    ("a.json", b'[{"text": "x"} {"text": "y"}]', r"a.json\[1\]: not JSON: a comma is missing"),
    ("a.json", b'[{"text": "x"}, {"text": "y', r"a.json\[1\]: not JSON: Unterminated string"),
    ("a.json", b'[{"text": "\xff"}]', r"a.json\[0\]: not UTF-8"),
    ("a.jsonl.gz", gzip.compress(lines(RECORDS))[:-20], r"damaged or cut short"),
    ("a.jsonl.gz", b"not gzip", r"damaged or cut short"),
    ("a.jsonl.zst", b"not zstandard", r"damaged or cut short"),
    ("a.jsonl.zst", zstandard.compress(lines(RECORDS))[:-9], r"damaged or cut short|not JSON"),
    ("a.jsonl.xz", lzma.compress(lines(RECORDS))[:-40], r"damaged or cut short"),
    ("a.jsonl.bz2", bz2.compress(lines(RECORDS))[:-40], r"damaged or cut short"),
    ("a.jsonl.bz2", b"not bzip2", r"damaged or cut short"),
    ("a.parquet", parquet(RECORDS)[:-9], r"a.parquet: is no Parquet file"),
    ("a.parquet", parquet([{"body": "x"}]), r"a.parquet: has no column text; it has body"),
    ("a.parquet", parquet([{"text": 3}]), r"a.parquet\[0\]: data.text_key \(text\) is no string"),
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


@pytest.fixture
def config(tmp_path: Path) -> Iterator[DataConfig]:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(RECORDS))
    yield local(tmp_path, "texts", source_key="meta.set")


def made(config: DataConfig, tokenizer: Tokenizer, workers: int = 1, **changes: object) -> Any:
    settings = TokenizerConfig(model=str(tokenizer.path), vocab_size=1200)
    return prepare(config, settings, workers=workers, on_progress=lambda counts: None, **changes)[0]  # type: ignore[arg-type]


def test_a_corpus_holds_every_document_whole(config: DataConfig, tokenizer: Tokenizer) -> None:
    about = made(config, tokenizer)
    decoded = []
    for split, sources in about["splits"].items():
        for counts in sources.values():
            (stem,) = counts["shards"]
            shard = Shard(Path(config.path) / stem, verify=True)
            assert counts["documents"] == shard.n_documents and counts["tokens"] == shard.n_tokens
            for i in range(shard.n_documents):
                ids = shard.document(i).tolist()
                assert ids[-1] == tokenizer.eos_id
                decoded.append(tokenizer.decode(ids[:-1]))
                assert split_of(digest_of(Document(decoded[-1], "", ""), config), config) == split
    assert sorted(decoded) == sorted(record["text"] for record in RECORDS)
    corpus = open_corpus(config, vocab_size=1280)
    assert corpus.sources == ("c++", "wikipedia_en") and corpus.train.n_packs > 0 and corpus.valid.n_packs > 0
    assert corpus.bytes_per_token is not None and len(corpus.bytes_per_token) == 1280


def contents(folder: str | Path) -> dict[str, bytes]:
    """Give all that a corpus holds but the description of where it was made."""
    root = Path(folder)
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    files["corpus.json"] = json.dumps(json.loads(files["corpus.json"])["splits"]).encode()
    return files


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 100)
    monkeypatch.setattr("data.shards.SHARD_BYTES", 400)


def test_the_result_does_not_depend_on_the_workers(
    config: DataConfig, tokenizer: Tokenizer, small_blocks: None
) -> None:
    made(config, tokenizer, workers=1)
    other = dataclasses.replace(config, path=config.path + "2")
    made(other, tokenizer, workers=3)
    assert contents(config.path) == contents(other.path)
    assert len([name for name in contents(config.path) if name.endswith(".bin")]) > 4, "files of limited size"


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_parts_make_the_same_documents_whichever_ends_last(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, small_blocks: None, shards: int
) -> None:
    (tmp_path / "texts" / "b.jsonl.gz").write_bytes(gzip.compress(lines([{"text": f"{i} more"} for i in range(40)])))
    whole = made(config, tokenizer)
    other = dataclasses.replace(config, path=config.path + "2")
    order = random.Random(shards).sample(range(shards), shards)
    for shard in order:
        assert not Path(other.path).exists()
        about = made(other, tokenizer, shards=shards, shard=shard)
    assert about is not None
    for split, sources in whole["splits"].items():
        for source, counts in sources.items():
            for key in ("documents", "tokens", "text_bytes"):
                assert counts[key] == about["splits"][split][source][key]
    assert texts_of(config, whole, tokenizer) == texts_of(other, about, tokenizer)


def texts_of(config: DataConfig, about: dict, tokenizer: Tokenizer) -> list[str]:
    stems = [stem for split in about["splits"].values() for counts in split.values() for stem in counts["shards"]]
    files = [Shard(Path(config.path) / stem, verify=True) for stem in stems]
    return sorted(tokenizer.decode(file.document(i).tolist()) for file in files for i in range(file.n_documents))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=9), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_every_block_of_every_item_is_one_parts(sizes: list[int], shards: int) -> None:
    todo = [Item(str(i), "s", size=size) for i, size in enumerate(sizes)]
    parts = [shares(todo, shards, shard) for shard in range(shards)]
    for number in range(len(todo)):
        taken = [(first, step) for first, step in (part[number] for part in parts) if first >= 0]
        assert sorted(first for first, _ in taken) == list(range(len(taken))) and {step for _, step in taken} == {
            len(taken)
        }


KILLED = """
import sys, time
from pathlib import Path
from data import read, shards
from data.config import DataConfig, Source, TokenizerConfig
from data.prepare import prepare
read.BLOCK_BYTES, shards.SHARD_BYTES = 2000, 9000
text, path, tokenizer, workers = sys.argv[1:]
data = DataConfig(name="mine", path=path, source=Source.local, input=text, source_key="set", valid_fraction=0.1,
                  seq_len=8, micro_batch_size=1)
def on_progress(counts):
    print(counts.documents, flush=True)
    time.sleep(0.004)
prepare(data, TokenizerConfig(model=tokenizer, vocab_size=1), workers=int(workers), on_progress=on_progress, save_every_s=0.01)
"""


def test_a_run_that_is_killed_at_any_moment_goes_on_and_makes_the_same_bytes(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    draw = random.Random(0)
    (tmp_path / "texts").mkdir()
    for name in ("a.jsonl", "b.jsonl.gz", "c.txt", "d.jsonl.zst"):
        records = [{"text": f"{i} " + "some words " * draw.randrange(60), "set": f"s{i % 3}"} for i in range(250)]
        pack = PACKED["." + name.split(".")[2]] if name.count(".") == 2 else bytes
        (tmp_path / "texts" / name).write_bytes(pack(lines(records)))

    def start(path: str, workers: int) -> subprocess.Popen[str]:
        arguments = [str(tmp_path / "texts"), str(tmp_path / path), str(tokenizer.path), str(workers)]
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    whole = start("whole", 1)
    printed = whole.communicate(timeout=100)[0].split()
    assert whole.returncode == 0 and len(printed) > 100
    kills = 0
    while not (tmp_path / "killed").exists():
        run = start("killed", 2 if kills == 3 else 1)
        assert run.stdout is not None
        first = run.stdout.readline()
        time.sleep(draw.uniform(0, 0.08))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        run.stdout.close()
        kills += 1
        if kills >= 20:
            assert first == "" or int(first) > 1, "it goes on from where it was killed"
            last = start("killed", 1)
            assert last.communicate(timeout=100)[0] is not None and last.returncode == 0
    assert kills >= 20, "it was done before it was killed so often: make the text longer"
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def test_the_same_corpus_is_used_again_and_another_is_not_overwritten(config: DataConfig, tokenizer: Tokenizer) -> None:
    settings = TokenizerConfig(model=str(tokenizer.path), vocab_size=1200)
    assert not existing(config, settings)
    made(config, tokenizer)
    assert existing(dataclasses.replace(config, seq_len=64, workers=7), settings)
    with pytest.raises(DataError, match=r"was made with other settings: data.text_key \(text, now body\)"):
        existing(dataclasses.replace(config, text_key="body"), settings)
    with pytest.raises(DataError, match=r"tokenizer.add_bos \(False, now True\)"):
        existing(config, dataclasses.replace(settings, add_bos=True))


def test_a_failure_leaves_no_corpus_and_what_was_done_is_gone_on_with(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, small_blocks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts" / "b.jsonl").write_bytes(b"{")
    with pytest.raises(DataError, match="b.jsonl:1"):
        made(config, tokenizer)
    partial = tmp_path / "corpora" / ".mine.partial"
    assert not Path(config.path).exists() and (partial / "journal-000.json").exists()
    skipping = dataclasses.replace(config, on_bad_record=OnBadRecord.skip)
    settings = TokenizerConfig(model=str(tokenizer.path), vocab_size=1200)
    firsts: list[int] = []
    _, bad = prepare(skipping, settings, workers=1, on_progress=lambda counts: firsts.append(counts.documents))
    assert firsts[0] > 50 and bad.count == 1 and "b.jsonl:1" in bad.places[0]
    (tmp_path / "texts" / "b.jsonl").unlink()
    other = dataclasses.replace(config, path=config.path + "2")
    made(other, tokenizer)
    assert contents(config.path) == contents(other.path)
    assert "removed" not in capsys.readouterr().out


def test_what_other_settings_or_another_text_left_is_not_gone_on_with(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, small_blocks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts" / "b.jsonl").write_bytes(b"{")
    for change in ("settings", "text"):
        with pytest.raises(DataError, match="b.jsonl:1"):
            made(config, tokenizer)
        if change == "settings":
            config = dataclasses.replace(config, valid_seed=7)
        else:
            (tmp_path / "texts" / "a.jsonl").write_bytes(lines(RECORDS[1:]))
    (tmp_path / "texts" / "b.jsonl").unlink()
    made(config, tokenizer)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and "data.valid_seed (42, now 7)" in told[0] and "another" in told[1] and "a.jsonl" in told[1]
    other = dataclasses.replace(config, path=config.path + "2")
    made(other, tokenizer)
    assert contents(config.path) == contents(other.path)


def test_a_full_disk_leaves_nothing_that_looks_like_a_corpus(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(writer: ShardWriter) -> None:
        writer.close_files()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("data.shards.ShardWriter.close", full)
        with pytest.raises(OSError, match="No space left"):
            made(config, tokenizer)
    assert [path.name for path in (tmp_path / "corpora").iterdir()] == [".mine.partial"]
    made(config, tokenizer)
    assert [path.name for path in (tmp_path / "corpora").iterdir()] == ["mine"]


def test_files_that_came_since_are_added_when_asked_and_the_rest_is_not_touched(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    made(config, tokenizer)
    before = contents(config.path)
    settings = TokenizerConfig(model=str(tokenizer.path), vocab_size=1200)
    (tmp_path / "texts" / "b.jsonl").write_bytes(
        lines([{"text": f"new {i}", "meta": {"set": "new"}} for i in range(30)])
    )
    with pytest.raises(
        DataError, match=r"1 files of data.input came after .* b.jsonl first; pass add=true|b.jsonl first"
    ):
        existing(config, settings)
    assert not existing(config, settings, add=True)
    parts = open_corpus(config, vocab_size=1200).parts
    about = made(config, tokenizer, add=True)
    assert existing(config, settings) and about["splits"]["train"]["new"]["documents"] > 10
    after = contents(config.path)
    assert all(after[name] == content for name, content in before.items() if name != "corpus.json")
    corpus = open_corpus(config, vocab_size=1200)
    assert set(parts) < set(corpus.parts) and "new" in corpus.sources
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(RECORDS[1:]))
    with pytest.raises(DataError, match=r"a.jsonl has \d+ bytes and had \d+ when"):
        existing(config, settings)


def test_what_is_held_out_whole_is_not_trained_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(RECORDS))
    (tmp_path / "held.jsonl").write_bytes(lines([{"text": "only held out"}, RECORDS[7]]))
    config = local(tmp_path, "texts", valid_input=str(tmp_path / "held.jsonl"))
    with pytest.raises(DataError, match=r"a.jsonl:8: is in the validation split as well"):
        made(config, tokenizer)
    about = made(dataclasses.replace(config, on_bad_record=OnBadRecord.skip), tokenizer)
    assert about["splits"]["train"]["mine"]["documents"] == len(RECORDS) - 1
    assert about["splits"]["valid"]["mine"]["documents"] == 2


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
    monkeypatch.setattr(reading, "PIECE_CHARS", 50)
    config = local(tmp_path, "*.txt", valid_fraction=0.0)
    about = made(config, tokenizer)
    shard = Shard(Path(config.path) / about["splits"]["train"]["mine"]["shards"][0], verify=True)
    assert shard.n_documents == 2 and about["splits"]["train"]["mine"]["text_bytes"] == len((text + "another").encode())
    assert shard.document(0).tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\xff")
    with pytest.raises(DataError, match="a.txt: not UTF-8"):
        read(config)


def test_a_line_too_long_to_hold_is_left_out_and_the_rest_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = json.dumps({"text": "x" * (3 << 19)})
    texts = [{"text": f"{i} " + "y" * 300} for i in range(9)]
    raw = lines(texts[:4]) + long.encode() + b"\n" + lines(texts[4:])
    (tmp_path / "a.jsonl").write_bytes(raw)
    for block in (1000, 5000, 400_000, 1 << 21):
        monkeypatch.setattr(reading, "BLOCK_BYTES", block)
        bad = BadRecords(OnBadRecord.skip)
        config = local(tmp_path, "a.jsonl", on_bad_record=OnBadRecord.skip, max_record_mb=1)
        found = list(all_documents(config, bad))
        kept = [document.text[:2] for document in found if document.text[2] == "y"]
        assert kept == [f"{i} " for i in range(9)]
        assert found[-1].place.endswith("a.jsonl:10")
        assert block > 1 << 20 or (
            bad.places == [f"{tmp_path}/a.jsonl:5: a line of more than data.max_record_mb (1) MB"]
        )


def test_a_tokenizer_without_the_asked_for_token_is_refused(
    config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.prepare.load_tokenizer", lambda path: _without_eos(tokenizer))
    with pytest.raises(DataError, match=r"tokenizer.add_eos \(true\): .* has no such token"):
        made(config, tokenizer)


def _without_eos(tokenizer: Tokenizer) -> Tokenizer:
    other = type(tokenizer)(tokenizer.path)  # type: ignore[call-arg]
    other.eos_id = None
    return other


def tampered(config: DataConfig, change: str) -> None:
    folder = Path(config.path)
    match change:
        case "tokenizer":
            path = folder / "tokenizer" / "tokenizer.model"
            path.write_bytes(path.read_bytes() + b"\xc0\x3e\x01")
        case "corpus.json":
            (folder / "corpus.json").write_text("{}")
        case "bin":
            path = next((folder / "train").glob("*.bin"))
            path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("change", "vocab_size", "sentence"),
    [
        ("none", 1199, r"has 1200 pieces, more than model.vocab_size \(1199\); pass model.vocab_size=1280"),
        ("tokenizer", 1200, "is not the tokenizer that .* was made with"),
        ("corpus.json", 1200, "does not describe a corpus"),
        ("bin", 1200, "it was cut short or changed"),
    ],
)
def test_an_unfit_corpus_is_told_when_opened(
    config: DataConfig, tokenizer: Tokenizer, change: str, vocab_size: int, sentence: str
) -> None:
    made(config, tokenizer)
    tampered(config, change)
    with pytest.raises(DataError, match=sentence):
        open_corpus(config, vocab_size=vocab_size)


def test_missing_and_too_little_data_are_told(config: DataConfig, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="run: python prepare_data.py data=mine"):
        open_corpus(config, vocab_size=1200)
    made(config, tokenizer)
    with pytest.raises(DataError, match=r"none of its sources fills one pack of 100000"):
        open_corpus(dataclasses.replace(config, seq_len=100_000, packing=Packing.internlm), vocab_size=1200)
    with pytest.raises(DataError, match=r"data.mix.en: there is no such source; choose from c\+\+, wikipedia_en"):
        open_corpus(dataclasses.replace(config, mix={"en": 1.0}), vocab_size=1200)


def test_a_changed_corpus_has_another_fingerprint(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    made(config, tokenizer)
    before = open_corpus(config, vocab_size=1200).fingerprint
    assert open_corpus(config, vocab_size=1200).fingerprint == before
    shutil.rmtree(config.path)
    (tmp_path / "texts" / "b.jsonl").write_bytes(lines([{"text": "more text"}]))
    made(config, tokenizer)
    assert open_corpus(config, vocab_size=1200).fingerprint != before


def test_the_builtin_text_is_the_same_each_time_and_keeps_files_together() -> None:
    documents = list(builtin_documents())
    assert {document.source for document in documents} == {"code", "en"}
    assert sum(len(document.text) for document in documents) > 5e6
    assert [d.place for d in documents[:300]] == [d.place for d in islice(builtin_documents(), 300)]
    docstring = next(d for d in documents if d.source == "en" and d.place.startswith("argparse.py"))
    source = next(d for d in documents if d.source == "code" and d.place == "argparse.py")
    assert docstring.key == source.key


def test_a_long_document_takes_memory_in_proportion(tokenizer: Tokenizer) -> None:
    import tracemalloc

    from data.tokenizer import encode_documents

    text = ("a line of some words, again and again\n" * 10_000) * 8  # 3 MB
    tracemalloc.start()
    ids = encode_documents(tokenizer, [text], add_bos=False, add_eos=True)[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(ids) > 400_000
    assert peak < 4 * ids.nbytes + 20 * 2**20
    assert ids[:1000].tolist() == tokenizer.encode(text[:8000])[:1000]


def test_a_hugging_face_dataset_is_split_as_the_tutorial_splits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(lines(RECORDS))
    config = local(tmp_path, "none", source=Source.huggingface, dataset=str(tmp_path / "set"), source_key="meta.set")
    found = list(all_documents(config, BadRecords(OnBadRecord.error)))
    split = datasets.Dataset.from_list(RECORDS).train_test_split(test_size=0.2, seed=42)
    for part, rows in (("train", split["train"]), ("valid", split["test"])):
        assert [document.text for document in found if document.split == part] == rows["text"][:]
    assert {document.source for document in found} == {"wikipedia_en", "c++"}
    assert len(list(all_documents(dataclasses.replace(config, max_documents=7), BadRecords(OnBadRecord.error)))) == 7


def test_a_dataset_that_cannot_be_had_is_a_sentence(tmp_path: Path) -> None:
    config = local(tmp_path, "none", source=Source.huggingface, dataset=str(tmp_path / "nothing"))
    with pytest.raises(DataError, match=r"data.dataset \(.*nothing\) cannot be loaded"):
        list(all_documents(config, BadRecords(OnBadRecord.error)))
