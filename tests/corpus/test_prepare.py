"""From files to a corpus: what is made, by however many processes, and of what."""

import dataclasses
import itertools
import os
import random
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import units
from corpus.config import DataError, Source, TokenizerConfig
from corpus.inputs import Item, list_items
from corpus.merge import are_first, merge_units
from corpus.prepare import differences, is_prepared, made_by, tokenizer_texts
from corpus.units import Job, plan_units, unit_folder
from data.config import DataConfig
from data.dataset import open_corpus
from data.manifest import mix_weights
from data.shards import Shard
from data.tokenizer import Tokenizer
from tests.corpora import PACKED, RECORDS, command, contents, lines, local, made, n_documents, parquet, read, write


def other(config: DataConfig, name: str = "2", **changes: Any) -> DataConfig:
    return dataclasses.replace(config, path=config.path + name, **changes)


def stored(config: DataConfig, about: dict, tokenizer: Tokenizer) -> list[str]:
    """Return the texts of a corpus, decoded."""
    stems = [stem for split in about["splits"].values() for counts in split.values() for stem in counts["shards"]]
    files = [Shard(Path(config.path) / stem, verify=True) for stem in stems]
    return sorted(tokenizer.decode(file.document(i).tolist()) for file in files for i in range(file.n_documents))


def test_contents_of_a_corpus(config: DataConfig, tokenizer: Tokenizer, small_units: None) -> None:
    about = made(config, tokenizer)
    splits = {d.text: (d.split, d.source) for d in read(config)}
    decoded = []
    for split, sources in about["splits"].items():
        for source, counts in sources.items():
            shards = [Shard(Path(config.path) / stem, verify=True) for stem in counts["shards"]]
            assert counts["documents"] == sum(shard.n_documents for shard in shards)
            assert counts["tokens"] == sum(shard.n_tokens for shard in shards)
            found = [shard.document(i).tolist() for shard in shards for i in range(shard.n_documents)]
            texts = [tokenizer.decode(ids[:-1]) for ids in found]
            assert found == [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
            assert all(splits[text] == (split, source) for text in texts)
            assert counts["text_bytes"] == sum(len(text.encode()) for text in texts)
            decoded += texts
    assert sorted(decoded) == sorted(record["text"] for record in RECORDS)
    corpus = open_corpus(config, vocab_size=1280)
    assert corpus.sources == ("C++", "Wikipedia (en)") and corpus.train.n_packs > 0 and corpus.valid.n_packs > 0
    assert corpus.bytes_per_token is not None and len(corpus.bytes_per_token) == 1280


@pytest.fixture
def every_format(tmp_path: Path) -> DataConfig:
    """Files of every format and compression, with duplicates in and across them."""
    files = {"b.parquet": parquet(RECORDS + RECORDS[::2]), "c.txt": b"A text of its own. " * 30}
    for k, (suffix, pack) in enumerate(PACKED.items()):
        records = [{"text": f"{k} {i}", "meta": {"set": f"s{i % 3}"}} for i in range(40)] + RECORDS[:25]
        files[f"a{k}.jsonl{suffix}"] = pack(lines(records))
    write(tmp_path / "texts", files)
    return local(tmp_path, "texts", source_key="meta.set")


def test_workers_and_stops_do_not_matter(every_format: DataConfig, tokenizer: Tokenizer, small_units: None) -> None:
    added: list[tuple[int, int, int, float]] = []

    def stop_later(*counts: Any) -> None:
        added.append(counts)
        if len(added) == 8:
            raise KeyboardInterrupt

    about = made(every_format, tokenizer)
    assert about["units"] > 10 and n_documents(about) == 5 * 40 + len(RECORDS) + 1
    assert about["left_out"]["duplicates"] == 5 * 25 + len(RECORDS) // 2
    again = other(every_format)
    with pytest.raises(KeyboardInterrupt):
        made(again, tokenizer, progress=stop_later)
    added.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "BATCH_BYTES", 5000)
        made(again, tokenizer, 2, progress=lambda *counts: added.append(counts))
    assert contents(again.path) == contents(every_format.path)
    assert len([name for name in contents(every_format.path) if name.endswith(".bin")]) > 6
    assert 0.9 < sum(share for *_, share in added) <= 1 and added[0][2] == 0, "the first units are an earlier run's"
    assert sum(documents for documents, *_ in added) == 5 * 65 + 90 + 1


def test_shards_in_any_order(every_format: DataConfig, tokenizer: Tokenizer, small_units: None) -> None:
    made(every_format, tokenizer)
    again = other(every_format)
    for shard in random.Random(0).sample(range(5), 5):
        assert not Path(again.path).exists()
        for number in range(5):  # as a killed process of the same number leaves them
            folder = unit_folder(Path(again.path).with_name(f".{Path(again.path).name}.partial"), number)
            left = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}")
            left.mkdir(parents=True, exist_ok=True)
        made(again, tokenizer, shards=5, shard=shard)
    assert contents(again.path) == contents(every_format.path)
    assert made(again, tokenizer, shards=5, shard=0) is not None, "a job that is started again finds it done"


@given(st.lists(st.tuples(st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.json", "a.txt"]), st.integers(0, 5000))))
@settings(max_examples=40, deadline=None)
def test_units_cover_every_byte_once(files: list[tuple[str, int]]) -> None:
    items = [Item(name, "s", size=size) for name, size in files]
    config = DataConfig(name="x", path="x", source=Source.local, seq_len=8, micro_batch_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "LEAST_UNIT_BYTES", 500)
        plan = list(plan_units(items, config))
    assert [unit.number for unit in plan] == list(range(len(plan)))
    spans = [span for unit in plan for span in unit.spans]
    assert [span.item for span in spans] == sorted(span.item for span in spans)
    for number, item in enumerate(items):
        its = [span for span in spans if span.item == number]
        assert its[0].start == 0 and its[-1].stop == units.END
        assert all(a.stop == b.start for a, b in itertools.pairwise(its))
        assert len(its) == 1 or item.path.startswith("a.jsonl")


@given(st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=6))
@settings(max_examples=40, deadline=None)
def test_duplicates_are_all_but_the_first(arrays: list[list[int]]) -> None:
    found = are_first([np.array(its, dtype=np.uint64) for its in arrays])
    seen: set[int] = set()
    for its, kept in zip(arrays, found, strict=True):
        assert kept.tolist() == [value not in seen and value not in its[:k] for k, value in enumerate(its)]
        seen |= set(its)


def test_damaged_unit_is_done_again(
    config: DataConfig, tokenizer: Tokenizer, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(job: Job, *rest: Any) -> Any:
        path = next((job.folder / "units").glob("*/*.tokens"))
        os.truncate(path, path.stat().st_size - 4)
        return merge_units(job, *rest)

    monkeypatch.setattr("corpus.merge.COPY_TOKENS", 10)
    with monkeypatch.context() as patch, pytest.raises(DataError, match=r"\.tokens is damaged and was removed"):
        patch.setattr("corpus.prepare.merge_units", lose)
        made(config, tokenizer)
    assert n_documents(made(config, tokenizer)) == len(RECORDS)


def test_max_documents_counts_in_order(every_format: DataConfig, tokenizer: Tokenizer, small_units: None) -> None:
    for workers, limit in ((2, 50), (1, 10_000)):
        about = made(other(every_format, f"{limit}", max_documents=limit), tokenizer, workers)
        assert n_documents(about) + about["left_out"]["duplicates"] == min(limit, 5 * 65 + 90 + 1)


def test_added_files(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made(dataclasses.replace(config, input="texts"), tokenizer)
    monkeypatch.chdir("/")
    before, fingerprints = contents(config.path), open_corpus(config, vocab_size=1200).fingerprints
    new = [{"text": f"new {i}", "meta": {"set": "new"}} for i in range(30)]
    (tmp_path / "texts" / "0.jsonl").write_bytes(lines(RECORDS[:9] + new))
    with pytest.raises(DataError, match=r"0.jsonl first; .*add=true"):
        is_prepared(command(config, tokenizer))
    assert not is_prepared(command(config, tokenizer, add=True))
    about = made(config, tokenizer, add=True)
    assert about == made(config, tokenizer, add=True), "it is there already"
    assert n_documents(about) == len(RECORDS) + 30 and about["left_out"]["duplicates"] == 9
    after = contents(config.path)
    assert all(after[name] == content for name, content in before.items() if name != "corpus.json")
    corpus = open_corpus(config, vocab_size=1200)
    assert set(fingerprints) < set(corpus.fingerprints) and "new" in corpus.sources
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(RECORDS[1:]))
    with pytest.raises(DataError, match=r"a.jsonl has changed"):
        is_prepared(command(config, tokenizer))


def test_duplicates_of_added_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """What is trained on already is not held out later, nor the other way round, though the first files are gone."""
    write(tmp_path, {"texts/a.jsonl": lines(RECORDS[:20]), "held/v.jsonl": lines(RECORDS[20:40])})
    config = local(tmp_path, "texts", valid_input=str(tmp_path / "held"))
    made(config, tokenizer)
    (tmp_path / "held" / "v.jsonl").unlink()
    held_out = lines([*RECORDS[10:30], {"text": "new"}])
    write(tmp_path, {"held/w.jsonl": held_out, "texts/b.jsonl": lines(RECORDS[10:50])})
    about = made(config, tokenizer, add=True)
    assert (n_documents(about, "train"), n_documents(about, "valid")) == (30, 21)
    assert stored(config, about, tokenizer) == sorted([*(record["text"] for record in RECORDS[:50]), "new"])


def test_spellings_of_an_input(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("a", "b/[1]"):
        write(tmp_path, {f"texts/{folder}/x.jsonl": lines([{"text": f"{folder} {i}"} for i in range(9)])})
    (tmp_path / "link").symlink_to(tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    spellings: list[list[Any]] = [
        ["texts", "link", f"{tmp_path}/texts/", "texts/b/../", ["link/"], f"file://{tmp_path}/texts"],
        [["texts/a", "texts/b"], ["link/b", "texts/../texts/a/", "texts/a"]],
        ["texts/*/*.jsonl", "link/*/*.jsonl", "./texts/./*/*.jsonl"],
    ]
    for number, inputs in enumerate(spellings):
        config = local(tmp_path, "", name="n", input=inputs[0], path=str(tmp_path / f"{number}"))
        made(config, tokenizer)
        for one in inputs:
            relative = TokenizerConfig(model=os.path.relpath(tokenizer.path), vocab_size=2)
            assert is_prepared(command(dataclasses.replace(config, input=one), relative)), one
            named = (one, {"input": inputs[0]}, {"input": one, "text_key": "text"})
            settings = [made_by(dataclasses.replace(config, sources={"s": its}), relative) for its in named]
            assert settings[0]["data.sources"] == settings[1]["data.sources"] == settings[2]["data.sources"]
    with pytest.raises(DataError, match=r"data.input .*data.text_suffixes \("):
        is_prepared(command(dataclasses.replace(config, input="texts/b", text_suffixes=[".x"]), tokenizer))


def test_text_that_a_tokenizer_is_trained_on(tmp_path: Path) -> None:
    for name in "ab":
        records = [{"text": f"{name}{i} some words of a text that goes on"} for i in range(4000)]
        write(tmp_path, {f"texts/{name}.jsonl.gz": PACKED[".gz"](lines(records))})
    config = local(tmp_path, "texts")
    whole, part = (list(tokenizer_texts(config, list_items(config), n)) for n in (10_000_000, 20_000))
    train = [d.text for d in read(config) if d.split == "train"]
    assert whole == train and 0.9 * 20_000 < sum(map(len, part)) < 1.1 * 20_000
    assert {text[0] for text in part} == {"a", "b"} and set(part) < set(train)


def test_settings_of_a_prepared_corpus(config: DataConfig, tokenizer: Tokenizer) -> None:
    of_model = command(config, tokenizer).tokenizer
    assert not is_prepared(command(config, tokenizer))
    made(config, tokenizer)
    assert is_prepared(command(dataclasses.replace(config, seq_len=64, workers=7), tokenizer))
    with pytest.raises(DataError, match=r"data.text_key \(text, now body\)"):
        is_prepared(command(dataclasses.replace(config, text_key="body"), of_model))
    with pytest.raises(DataError, match=r"tokenizer.add_bos \(False, now True\)"):
        is_prepared(command(config, dataclasses.replace(of_model, add_bos=True)))
    now = made_by(config, of_model)
    assert not differences(now | {"data.gone": False}, now), "a setting that is no more, at its default"
    assert differences(now | {"data.gone": True}, now) == "data.gone (True, now None)"
    (Path(config.path) / "corpus.json").unlink()
    with pytest.raises(DataError, match="not a corpus"):
        made(config, tokenizer)


def test_names_of_sources(tmp_path: Path, tokenizer: Tokenizer) -> None:
    names = ["C", "C#", "c", "F#", "中文", "日文", "a/b", "a_b", "..", "Wikipedia (en)", "长" * 60, "长" * 60 + "名"]
    records = [{"text": f"{name} {i}", "from": name} for name in names for i in range(20)]
    (tmp_path / "a.jsonl").write_bytes(lines(records))
    config = local(tmp_path, "a.jsonl", source_key="from")
    about = made(config, tokenizer)
    train, valid = about["splits"]["train"], about["splits"]["valid"]
    assert sorted(train) == sorted(names)
    assert all(its["documents"] + valid.get(name, {"documents": 0})["documents"] == 20 for name, its in train.items())
    assert stored(config, about, tokenizer) == sorted(record["text"] for record in records)
    assert all(name.isascii() for name in contents(config.path))
    mixed = mix_weights(dataclasses.replace(config, mix={"C": 1, "wikipedia_en": 2, "日文": 3}), set(names))
    assert mixed == {"C": 1, "Wikipedia (en)": 2, "日文": 3}
    with pytest.raises(DataError, match="data.mix.f: there are several such sources"):
        mix_weights(dataclasses.replace(config, mix={"f": 1}), {"F", "F#"})
