"""prepare_data.py as it is typed: what it ends with, and its parts as one command."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import prepare_data
from conf.schema import PrepareConfig
from corpus.config import DataError, OnBadRecord, TokenizerConfig
from corpus.prepare import prepare
from data.config import DataConfig
from data.tokenizer import Tokenizer
from launch.config import LauncherConfig
from tests.corpora import RECORDS, ROOT, lines


def closing_output(
    config: DataConfig, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> tuple[str, list[str]]:
    """Prepare a corpus as the command does; give the table and the documents that are shown after it."""
    settings = TokenizerConfig(model=str(tokenizer.path), vocab_size=1200)
    whole = PrepareConfig(data=config, tokenizer=settings, workers=1, launcher=LauncherConfig())
    prepare_data.work(whole, "data=local data.name=mine")
    shown, command = capsys.readouterr().out.rsplit("\n\nnext: ", 1)
    assert command == "python train.py model=125m data=local data.name=mine\n"
    table, *documents = shown.split("\n--- a document of ")
    return table, documents


def test_the_command_ends_with_a_table_and_three_documents_as_they_will_be_trained_on(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "A naïve text of 今天 and many more words. " * 50
    records = [{"text": long, "meta": {"set": "long"}}] * 30 + RECORDS
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(records))
    table, documents = closing_output(config, tokenizer, capsys)
    counted = [line.split()[:3] for line in table.splitlines()[2:]]
    about = json.loads((Path(config.path) / "corpus.json").read_text())["splits"]
    expected = [
        [split, source, str(its["documents"])] for split, sources in about.items() for source, its in sources.items()
    ]
    assert [row for row in counted if row[1] != "(all)"] == expected and len(counted) == len(expected) + 2
    assert [text.split(", decoded again\n")[0] for text in documents] == ["c++", "long", "wikipedia_en"]
    texts = [text.split(", decoded again\n")[1].rstrip() for text in documents]
    short = {record["text"].rstrip() for record in RECORDS}
    assert texts[0] in short and texts[2] in short
    assert texts[1].endswith(" ...") and long.startswith(texts[1].removesuffix(" ..."))
    assert len(tokenizer.encode(texts[1].removesuffix(" ..."))) == prepare_data.SAMPLE_TOKENS
    again = closing_output(config, tokenizer, capsys)
    assert again[0].startswith(f"{config.path} was prepared before with the same settings") and again[1] == documents


def test_of_a_corpus_of_one_document_no_more_is_shown(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(RECORDS[:1]))
    _, documents = closing_output(dataclasses.replace(config, valid_fraction=0.0), tokenizer, capsys)
    assert len(documents) == 1


@pytest.mark.parametrize(
    ("content", "policy", "sentence"),
    [
        (b"", OnBadRecord.error, r"a.jsonl: holds no document; mend it, or leave such records out by"),
        (b'{"txt": "x"}\n' * 2, OnBadRecord.error, r"a.jsonl:1: .*text.*; mend it, or leave such records out by"),
        (b'{"txt": "x"}\n' * 2, OnBadRecord.skip, r"no training text in data.source \(local\): 2 bad records were left out, the first .*a.jsonl:1: .*text"),
        (b'{"text": "a b c"}\n', OnBadRecord.error, r"no tokenizer of 400 pieces \(tokenizer.vocab_size\) can be trained on this text: Vocabulary size too high"),
    ],
    ids=["empty", "bad", "all left out", "too little"],
)  # fmt: skip
def test_of_what_no_tokenizer_can_be_trained_is_told_and_why(
    config: DataConfig, tmp_path: Path, content: bytes, policy: OnBadRecord, sentence: str
) -> None:
    (tmp_path / "texts" / "a.jsonl").write_bytes(content)
    config = dataclasses.replace(config, on_bad_record=policy, source_key=None, valid_fraction=0.0)
    with pytest.raises(DataError, match=sentence):
        prepare(config, TokenizerConfig(vocab_size=400), workers=1, on_progress=lambda counts: None)
    assert not any(Path(config.path).parent.iterdir()), "nothing is left of it"


def test_of_what_is_refused_at_its_first_record_nothing_is_left(config: DataConfig, tokenizer: Tokenizer) -> None:
    settings = TokenizerConfig(model=str(tokenizer.path), vocab_size=1200)
    config = dataclasses.replace(config, text_key="body")
    with pytest.raises(DataError, match="is missing in it"):
        prepare(config, settings, workers=1, on_progress=lambda counts: None)
    assert not any(Path(config.path).parent.iterdir())


def test_files_that_are_passed_over_are_told_once(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.csv", "b.csv", "a.lz4"):
        (tmp_path / "texts" / name).write_text("a,b")
    assert closing_output(config, tokenizer, capsys)[0].splitlines()[0] == "3 files were passed over: 2 .csv, 1 .lz4"


def test_whoever_stops_it_is_told_how_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = OmegaConf.create({})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_data, "to_config", _interrupted)
        prepare_data.main.__wrapped__(cfg)  # type: ignore[attr-defined]
    assert capsys.readouterr().err == "stopped; the same command goes on from here\n"


def _interrupted(cfg: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data=local", "shards=8", "launcher=slurm"], ["--multirun", "shard=range(8)"]),
        (["shards=8", "shard=3"], []),
        (["shards=1"], []),
        (["shards=8", "--cfg", "job"], []),
        (["data=local"], []),
    ],
)
def test_shards_are_a_sweep_over_the_parts(arguments: list[str], expected: list[str]) -> None:
    assert prepare_data.spread(arguments) == expected


def test_a_corpus_in_parts_is_one_command(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "texts").mkdir()
    for name in "abc":
        (tmp_path / "texts" / f"{name}.jsonl").write_bytes(lines([{"text": f"{name} {i}"} for i in range(40)]))
    command = [sys.executable, "prepare_data.py", "data=local", f"data.input={tmp_path / 'texts'}", "shards=3"]
    places = [f"data.path={tmp_path / 'tokens'}", f"hydra.sweep.dir={tmp_path / 'jobs'}"]
    settings = [*places, f"tokenizer.model={tokenizer.path}", "workers=1"]
    done = subprocess.run([*command, *settings], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "tokens" / "corpus.json").read_text())
    assert sum(s["documents"] for split in about["splits"].values() for s in split.values()) == 120
    assert len(about["splits"]["train"]["local"]["shards"]) == 3
    assert "split  source" in done.stdout and done.stdout.count("is there when all are") == 2
