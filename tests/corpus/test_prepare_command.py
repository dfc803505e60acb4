"""The command itself: what it prints, and its shards as one command."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import prepare_data
from corpus.config import DataError, OnBadRecord, TokenizerConfig
from data.config import DataConfig
from data.dataset import open_corpus
from data.tokenizer import Tokenizer
from tests.corpora import RECORDS, ROOT, command, lines, made, n_documents, write


def closing_output(config: DataConfig, tokenizer: Tokenizer, capsys: Any) -> tuple[str, list[str]]:
    """Prepare a corpus as the command does; return the table and the documents that are shown after it."""
    prepare_data.work(command(config, tokenizer), "data=local data.name=mine")
    shown, next_command = capsys.readouterr().out.rsplit("\n\nnext: ", 1)
    assert next_command == "python train.py data=local data.name=mine\n"
    table, *documents = shown.split("\n--- a document of ")
    return table, documents


def test_printed_table_and_documents(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "A naïve text of 今天 and many more words. " * 50
    records = [{"text": f"{long}{i}", "meta": {"set": "long"}} for i in range(30)] + RECORDS + RECORDS[:3]
    ignored = dict.fromkeys(("a.csv", "b.csv", "a.lz4"), b"a,b")
    write(tmp_path / "texts", {"a.jsonl": lines([*records, {"text": ""}]) + b"{", **ignored})
    config.on_bad_record = OnBadRecord.skip
    table, documents = closing_output(config, tokenizer, capsys)
    not_read, duplicates, empty, bad, place, _, *rows = table.splitlines()
    assert not_read.endswith(": 2 .csv, 1 .lz4") and place.startswith(f"  {tmp_path}/texts/a.jsonl:95: not JSON")
    assert [re.findall(r"left out: (\d+)", line) for line in (duplicates, empty, bad)] == [["3"], ["1"], ["1"]]
    counted = [re.split(r"  +", line)[:3] for line in rows[1:]]
    about = json.loads((Path(config.path) / "corpus.json").read_text())["splits"]
    expected = [[split, name, str(its["documents"])] for split, found in about.items() for name, its in found.items()]
    assert [row for row in counted if row[1] != "(all)"] == expected and len(counted) == len(expected) + 2
    assert [text.split(", decoded\n")[0] for text in documents] == ["C++", "Wikipedia (en)", "long"]
    texts = [text.split(", decoded\n")[1].rstrip() for text in documents]
    short = {record["text"].rstrip() for record in RECORDS}
    assert texts[0] in short and texts[1] in short
    assert texts[2].endswith(" ...") and long.startswith(texts[2].removesuffix(" ..."))
    assert len(tokenizer.encode(texts[2].removesuffix(" ..."))) == prepare_data.SAMPLE_TOKENS
    again = closing_output(config, tokenizer, capsys)
    assert again[0].startswith(f"{config.path} was prepared before with the same settings") and again[1] == documents
    assert again[0].splitlines()[1:] == table.splitlines()[1:]


def test_flipped_bit_is_found(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own tokens are verified, by the command and by a run; and no text commands the terminal."""
    records = [{"text": f"clear \x1b[2J and \x9b0m ring\x07 {i}"} for i in range(9)]
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(records))
    whole = command(config, tokenizer, verify=True)
    prepare_data.work(whole, "data.input=https://me:secret@host/a")
    out = capsys.readouterr().out
    assert out.endswith("next: python train.py data.input=https://me:***@host/a\n")
    assert re.search(r"^shards verified: \d+\n", out)
    assert not set(out) & set("\x1b\x9b\x07") and r"clear \x1b[2J and \x9b0m ring\x07" in out
    shard = max(Path(config.path).glob("train/*.bin"))
    raw = bytearray(shard.read_bytes())
    raw[0] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(DataError, match=f"{shard.name} is missing or damaged; prepare it again"):
        prepare_data.work(whole)
    corpus = open_corpus(config, vocab_size=4096)
    corpus.verify(1, 99)  # another rank's part
    with pytest.raises(DataError, match=shard.name):
        [corpus.verify(rank, 2) for rank in range(2)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"data.source \(local\) has no training text"),
        (b'{"txt": "x"}\n' * 2, "a.jsonl:1"),
        (b'{"text": "a b c"}\n', r"tokenizer.vocab_size"),
    ],
    ids=["empty", "bad", "too little"],
)
def test_text_too_bad_for_a_tokenizer(config: DataConfig, tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "texts" / "a.jsonl").write_bytes(content)
    config = dataclasses.replace(config, source_key=None, valid_fraction=0.0)
    with pytest.raises(DataError, match=reason):
        made(config, TokenizerConfig(vocab_size=400))
    assert [path.name for path in Path(config.path).parent.iterdir()] == [".mine.lock"]


def test_shards_are_a_sweep() -> None:
    assert prepare_data.spread(["data=local", "shards=8", "launcher=slurm"]) == ["--multirun", "shard=range(8)"]
    for arguments in (["shards=8", "shard=3"], ["shards=1"], ["shards=8", "--cfg", "job"], ["data=local"]):
        assert prepare_data.spread(arguments) == []


def test_shards_are_one_command(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path, {"texts/a.jsonl": lines([{"text": f"{i} " * 40_000} for i in range(80)])})
    line = [sys.executable, "prepare_data.py", "data=local", f"data.input={tmp_path / 'texts'}", "shards=2"]
    places = [f"data.path={tmp_path / 'tokens'}", f"hydra.sweep.dir={tmp_path / 'jobs'}"]
    settings = [*places, f"tokenizer.model={tokenizer.path}", "workers=1"]
    done = subprocess.run([*line, *settings], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "tokens" / "corpus.json").read_text())
    assert n_documents(about) == 80
    assert about["units"] > 1 and "split  source" in done.stdout and done.stdout.count("is done; ") == 1
