"""A record that is too long to hold is what it would be if it were short, in constant memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corpus import read as reading
from corpus.config import OnBadRecord, Style
from corpus.inputs import BadRecords
from corpus.texts import all_documents
from data.config import DataConfig
from data.tokenizer import Tokenizer
from tests.corpora import ROOT, lines, local

WRITTEN = ["a", " ", "words and words of a text ", "今天", "😀", "\u00a0", r"\n", r"\"", r"\\", r"\/", r"\u4eCa"]
WRITTEN += [r"\ud83d\ude00", r"\uD83D", r"\ude00", r"\u0020", "{[", "]},", ":"]
BROKEN = [
    r"\q",
    r"\u12",
    r"\ud83d\u",
    "\x01",
    "\t",
    '"',
    "\\",
    "{",
    "]",
    ",,",
    "NaN",
    "1e400",
    "\ufeff",
    "\x0b",
    "9" * 5000,
]
KEYS = ["text", "meta", "set", r"te\u0078t", "other " * 9, "x"]

string = st.lists(st.sampled_from(WRITTEN), max_size=12).map(lambda parts: f'"{"".join(parts)}"')
key = st.sampled_from(KEYS).map(lambda name: f'"{name}"')
blank = st.sampled_from(["", " ", "\r \t"])


def listed(opens: str, closes: str, members: Any) -> Any:
    return st.tuples(blank, st.lists(members, max_size=5)).map(lambda m: opens + m[0] + f",{m[0]}".join(m[1]) + closes)


def members(value: Any) -> Any:
    return st.tuples(key, blank, value).map(lambda m: f"{m[0]}{m[1]}:{m[1]}{m[2]}")


value = st.recursive(
    st.one_of(string, st.sampled_from(["12", "-0.5e3", "null", "true", '""', "1" * 60])),
    lambda inner: st.one_of(listed("[", "]", inner), listed("{", "}", members(inner))),
    max_leaves=6,
)
record = st.one_of(
    listed("{", "}", members(value)), listed("{", "}", st.one_of(members(value), members(string))), value
)
damage = st.one_of(st.none(), st.tuples(st.integers(0, 400), st.integers(0, 3), st.sampled_from([*BROKEN, *WRITTEN])))


@st.composite
def file_of_records(draw: st.DrawFn) -> tuple[str, bytes, int]:
    """Draw the kind of a file, its bytes, and how many of its records there are."""
    records = draw(st.lists(record, min_size=1, max_size=4))
    kind = draw(st.sampled_from([".jsonl", ".json"]))
    text = "\n".join(records) if kind == ".jsonl" else "[" + ",\n".join(records) + "]"
    if hurt := draw(damage):
        at, left_out, put_in = hurt
        text = text[:at] + put_in + text[at + left_out :]
    raw = draw(st.sampled_from(["", "\ufeff"])).encode() + text.encode()
    if kind == ".jsonl" and draw(st.integers(0, 5)) == 0:
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + b"\xe4\xbb" + raw[at:]
    return kind, raw, len(records)


def found_in(config: DataConfig) -> tuple[list[tuple[Any, ...]], int, int, list[str]]:
    """Give what is found in a corpus, the parts of a text put together."""
    bad, found, text = BadRecords(OnBadRecord.skip), [], ""
    for document in all_documents(config, bad):
        about = (document.source, document.place, document.split)
        if not document.begins:
            assert found.pop()[1:] == about
        text = document.text if document.begins else text + document.text
        found.append((text, *about))
    return found, bad.count, bad.empty, bad.places


@given(file_of_records(), st.integers(3, 90), st.integers(3, 40), st.sampled_from(["text", "meta.text"]), st.booleans())
@example((".jsonl", b'{"text": "%s\\q", "a" 1}' % (b"x" * 99), 1), 9, 9, "text", False)
@example((".jsonl", b'{"text": "%s", "a" 1}' % (b"x" * 99), 1), 9, 9, "text", False)
@example((".jsonl", b'{"text": "%s' % (b"x" * 99), 1), 9, 9, "text", False)
@example((".jsonl", b'{"text": "%s"}' % (rb"\ud83d\ude00" * 20), 1), 7, 9, "text", False)
@settings(max_examples=400, deadline=None)
def test_a_record_read_in_pieces_is_what_it_is_read_whole(
    tmp_path_factory: pytest.TempPathFactory,
    file: tuple[str, bytes, int],
    block: int,
    piece: int,
    text_key: str,
    raw: bool,
) -> None:
    kind, content, _ = file
    folder = tmp_path_factory.mktemp("long")
    (folder / f"a{kind}").write_bytes(content)
    config = local(folder, f"a{kind}", text_key=text_key, source_key="meta.set", raw_json=raw, valid_fraction=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("corpus.documents.SOURCE_CHARS", 2)  # a name is no long string, however it is written
        patch.setattr("corpus.chat.KEY_CHARS", 2)
        whole = found_in(config)
        patch.setattr(reading, "BLOCK_BYTES", block)
        patch.setattr(reading, "TEXT_BYTES", 30)
        patch.setattr("corpus.long.LONG_STRING", 24)
        patch.setattr("corpus.long.READ_BYTES", piece)
        patch.setattr("corpus.long.PIECE_CHARS", piece)
        assert found_in(config) == whole


MEASURED = """
import sys
from pathlib import Path
from data.config import DataConfig, OnBadRecord, Source, TokenizerConfig
from corpus.inputs import BadRecords
from corpus.prepare import prepare
from corpus.texts import all_documents
def peak():
    status = Path("/proc/self/status").read_text()  # getrusage would count the process that started this one
    return int(status.split("VmHWM:")[1].split()[0]) >> 10
small, large, path, tokenizer, how = sys.argv[1:]
found = []
for text in (small, large):
    data = DataConfig(name="mine", path=path + str(len(found)), source=Source.local, input=text, source_key="meta.set",
                      raw_json=how == "raw", valid_fraction=0.0, seq_len=8, micro_batch_size=1)
    if how == "prepare":
        about, _ = prepare(data, TokenizerConfig(model=tokenizer, vocab_size=1), workers=1, on_progress=lambda counts: None)
        found.append(about["splits"]["train"]["s"]["text_bytes"])
    else:
        found.append(sum(len(d.text.encode()) for d in all_documents(data, BadRecords(OnBadRecord.error))))
    print(found[-1], peak())
"""


LINE = r"some words of a \"text\" 今天 " * 20 + r"\n"


def write(path: Path, n_bytes: int) -> None:
    """Write a file with one record of about so many bytes."""
    opens, closes = ("[", "]") if path.suffix == ".json" else ("", "")
    with path.open("w", encoding="utf-8") as out:
        out.write(opens + '{"other": [1, 2], "text": "')
        for _ in range(n_bytes // len(LINE.encode())):
            out.write(LINE)
        out.write('", "meta": {"set": "s"}}' + closes)


def write_cell(path: Path, n_bytes: int) -> None:
    """Write a Parquet file whose second row is about so long."""
    texts = ["first", LINE * (n_bytes // len(LINE.encode())), "last"]
    pq.write_table(pyarrow.table({"text": texts, "meta": [{"set": "s"}] * 3}), path)


def write_rows(path: Path, n_bytes: int) -> None:
    """Write a Parquet file of about so many bytes with all its rows in one group."""
    draw = np.random.default_rng(0)
    texts = [draw.bytes(900).hex() for _ in range(max(1, n_bytes // 1800))]
    table = pyarrow.table({"text": texts, "meta": [{"set": "s"}] * len(texts)})
    pq.write_table(table, path, row_group_size=len(texts), compression="none")


def measured(
    folder: Path, name: str, n_bytes: int, tokenizer: Tokenizer, how: str, made_by: Callable[[Path, int], None] = write
) -> tuple[int, int]:
    """Give the bytes of the text in a file, and by how many MiB more memory it takes than a short one."""
    for size, file in ((1000, "small"), (n_bytes, "large")):
        made_by(folder / f"{file}{name}", size)
    paths = [str(folder / f"small{name}"), str(folder / f"large{name}"), str(folder / "corpus"), str(tokenizer.path)]
    done = subprocess.run([sys.executable, "-c", MEASURED, *paths, how], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (_, before), (text_bytes, after) = (map(int, line.split()) for line in done.stdout.splitlines())
    return text_bytes, after - before


@pytest.mark.parametrize(("name", "how"), [(".jsonl", "read"), (".json", "read"), (".jsonl", "raw")])
def test_a_long_record_takes_little_memory_to_read(tmp_path: Path, tokenizer: Tokenizer, name: str, how: str) -> None:
    text_bytes, more = measured(tmp_path, name, 80_000_000, tokenizer, how)
    assert text_bytes > 70_000_000 and more < 100


@pytest.mark.parametrize("how", ["read", "raw"])
def test_a_cell_of_parquet_takes_what_pyarrow_takes_to_read_it(tmp_path: Path, tokenizer: Tokenizer, how: str) -> None:
    text_bytes, more = measured(tmp_path, ".parquet", 80_000_000, tokenizer, how, write_cell)
    assert text_bytes > 70_000_000 and more < 3 * 80 + 50, "its page, that as a dictionary, and the cell"


def test_a_parquet_file_takes_little_memory_to_read_however_its_rows_are_grouped(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    text_bytes, more = measured(tmp_path, ".parquet", 200_000_000, tokenizer, "read", write_rows)
    assert text_bytes > 190_000_000 and more < 50


@pytest.mark.slow
def test_a_record_of_200_mb_takes_little_memory_to_prepare(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text_bytes, more = measured(tmp_path, ".jsonl", 200_000_000, tokenizer, "prepare")
    assert text_bytes > 180_000_000 and more < 100


@pytest.mark.slow
def test_a_cell_of_200_mb_takes_no_more_memory_to_prepare_than_to_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text_bytes, more = measured(tmp_path, ".parquet", 200_000_000, tokenizer, "prepare", write_cell)
    assert text_bytes > 180_000_000 and more < 3 * 200 + 50


def test_a_record_that_is_long_without_its_strings_is_left_out_and_the_rest_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = [{"text": f"{i} " + "y" * 300} for i in range(9)]
    long = b'{"text": "x", "numbers": [%s 1]}\n' % (b"1, " * 400_000)
    fits = lines([{"text": "z", "other": "w" * 2_000_000}])
    (tmp_path / "a.jsonl").write_bytes(lines(short[:4]) + long + lines(short[4:]) + fits)
    for block in (1000, 5000, 400_000):
        monkeypatch.setattr(reading, "BLOCK_BYTES", block)
        monkeypatch.setattr(reading, "TEXT_BYTES", 1000)
        found, count, _, places = found_in(
            local(tmp_path, "a.jsonl", on_bad_record=OnBadRecord.skip, max_document_mb=1)
        )
        assert [text[:2] for text, *_ in found] == [*(f"{i} " for i in range(9)), "z"]
        assert count == 1 and found[-1][2].endswith("a.jsonl:11")
        assert places[0].startswith(f"{tmp_path}/a.jsonl:5: a record of more than data.max_document_mb (1) MB")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_conversation_is_held_whole_up_to_a_limit(tmp_path: Path, name: str) -> None:
    records = [[{"role": "assistant", "content": "x" * size}] for size in (3, 5_000_000, 3)]
    made = [{"messages": messages} for messages in records]
    (tmp_path / name).write_bytes(lines(made) if name == "a.jsonl" else json.dumps(made).encode())
    found, count, _, places = found_in(local(tmp_path, name, style=Style.chat, max_document_mb=1))
    assert count == 1 and "a conversation of more than data.max_document_mb (1) MB" in places[0]
    assert [place.endswith((":1", ":3", "[0]")) for _, _, place, _ in found] == [True] * (2 if name == "a.jsonl" else 1)
    assert len(found_in(local(tmp_path, name, style=Style.chat))[0]) == 3


def test_a_line_of_text_too_long_to_hold_is_stripped_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("  short \n \t" + "words  and \t" * 90 + "   \nend")
    config = local(tmp_path, "a.txt", text_lines=True)
    whole = found_in(config)
    assert len(whole[0]) == 3
    monkeypatch.setattr(reading, "BLOCK_BYTES", 7)
    monkeypatch.setattr(reading, "TEXT_BYTES", 100)
    monkeypatch.setattr("corpus.long.PIECE_CHARS", 50)
    assert found_in(config) == whole
    (tmp_path / "a.txt").write_bytes(b"a\n" + b" " * 500 + b"\nb\n" + b"c" * 300 + b"\xff\n")
    found, count, _, places = found_in(config)
    assert [text for text, *_ in found] == ["a", "b"] and count == 1
    assert places == [f"{tmp_path}/a.txt:4: not UTF-8 at byte 300"]
