"""Preparation of a corpus from text.

A hidden folder next to the corpus receives the tokenizer, the plan, a folder per finished unit, then the shards.
Renaming it is the commit. An interrupted run continues from its contents.
"""

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from conf.schema import PrepareConfig
from corpus.chat import MARKERS, ChatEncoder, read_template
from corpus.config import CorpusConfig, DataError, Source, SourceConfig, Style, TokenizerConfig, as_paths
from corpus.documents import LeftOut
from corpus.inputs import Item, list_items
from corpus.merge import merge_units
from corpus.readers import Reader
from corpus.units import Job, Progress, plan_units, run_units
from data.hf_tokenizer import export_problem
from data.local_files import identity
from data.manifest import read_manifest
from data.tokenizer import CHAT_TEMPLATE, add_tokens, load_tokenizer, save_tokenizer, train_tokenizer
from tracking.run_folder import write_atomically

logger = logging.getLogger(__name__)

MOST_KINDS = 5  # of ignored suffixes to print
NOT_CONTENT = {"name", "path", "on_bad_record"}  # fields that do not affect the contents of a corpus


def made_by(data: CorpusConfig, tokenizer: TokenizerConfig) -> dict[str, Any]:
    """Return all settings that determine the contents of a corpus, as JSON."""
    made = {f"data.{f.name}": getattr(data, f.name) for f in fields(CorpusConfig) if f.name not in NOT_CONTENT}
    made |= {f"tokenizer.{key}": value for key, value in asdict(tokenizer).items()}
    if tokenizer.model is not None:
        made["data.vocab_size"] = made["tokenizer.vocab_size"] = None  # unused
    for key in ("tokenizer.model", "data.dataset", "data.chat_template"):  # a name, or a path if it exists
        made[key] = identity(made[key]) if made[key] and Path(made[key]).expanduser().exists() else made[key]
    made |= {f"data.{key}": value for key, value in _reading(data).items()}
    made["data.sources"] = {}
    shared = _reading(replace(data, input=None, valid_input=None))
    for name, source in data.source_configs().items():
        override = {key: value for key, value in _reading(source).items() if value != shared[key]}
        made["data.sources"][name] = override["input"] if list(override) == ["input"] else override
    return {key: getattr(value, "value", value) for key, value in made.items()}


def _reading(config: SourceConfig) -> dict[str, Any]:
    """Return the settings of a source in a canonical spelling and order."""
    found = {f.name: getattr(config, f.name) for f in fields(SourceConfig)}
    for key in ("input", "valid_input"):
        paths = sorted({identity(path) for path in as_paths(found[key])})
        found[key] = paths if len(paths) > 1 else next(iter(paths), None)
    return found | {"text_suffixes": sorted(set(config.text_suffixes))}


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Describe the keys in which two `made_by` differ.

    A key missing in `before` had its default; a key that no longer exists counts only if it was set.
    """
    before = made_by(CorpusConfig(), TokenizerConfig()) | before
    keys = [key for key in now | before if before.get(key) != now.get(key) and (key in now or before[key])]
    return ", ".join(f"{key} ({before.get(key)}, now {now.get(key)})" for key in keys)


def is_prepared(config: PrepareConfig) -> bool:
    """Return whether the corpus is complete; raise `DataError` if the folder has another corpus.

    New input files are an error too, or with `add` make the corpus incomplete.
    """
    folder = Path(config.data.path)
    if not folder.exists():
        return False
    if not (folder / "corpus.json").exists():
        raise DataError(f"{folder} exists and is not a corpus; choose another data.path, or remove it")
    about = read_manifest(folder)
    if differing := differences(about["made_by"], made_by(config.data, config.tokenizer)):
        raise DataError(f"{folder} was made with other settings: {differing}; choose another data.name, or remove it")
    new = _new_items(config.data, about)
    if new and not config.add:
        raise DataError(f"{folder} lacks {len(new)} new files, {new[0].path} first; add them with add=true")
    return not new


def _new_items(data: CorpusConfig, about: dict[str, Any]) -> list[Item]:
    """List the files that are new since a corpus was made; raise `DataError` if one of the others has changed."""
    if data.source is not Source.local:
        return []
    try:
        items = list_items(data)
    except DataError:
        return []  # the text may have been deleted
    for item in items:
        if about["input"].get(identity(item.path), item.size) != item.size:
            raise DataError(f"{item.path} has changed since {data.path} was made; choose another data.name")
    return [item for item in items if identity(item.path) not in about["input"]]


def prepare(config: PrepareConfig, progress: Progress = lambda *_: None) -> dict[str, Any] | None:
    """Do the units `shard` modulo `shards` of the corpus at `data.path`.

    Return the contents of corpus.json, or None if another shard's units are not done.
    """
    data, alone, folder = config.data, config.shards == 1, Path(config.data.path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0 if alone else -1)
    try:
        lock.acquire()
    except Timeout:
        raise DataError(f"another process is preparing this corpus ({lock.lock_file}); wait for it") from None
    try:
        if (partial / "corpus.json").exists():
            _publish(partial, folder)
        if is_prepared(config):
            return read_manifest(folder)
        before = read_manifest(folder) if folder.exists() else None
        ignored: Counter[str] = Counter()
        items = list_items(data, ignored) if before is None else _new_items(data, before)
        if ignored and not config.shard:
            print("not read:", ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(MOST_KINDS)))
        job = Job(config, partial, items)
        _begin(job, before)
        if not alone:
            lock.release()  # for the other shards, whose units are disjoint
        n_units = run_units(plan_units(items, data), job, progress)
        if not alone:
            lock.acquire()
            if not partial.exists():
                return read_manifest(folder)  # another shard finished the corpus
        if (about := merge_units(job, n_units, before)) is None:
            return None
        read = {identity(item.path): item.size for item in items if item.dataset is None}
        input = (before["input"] if before else {}) | read
        about = {"made_by": made_by(data, config.tokenizer), "input": input} | about
        write_atomically(partial / "corpus.json", json.dumps(about, indent=2) + "\n")
        _publish(partial, folder)
        return about
    finally:
        lock.release()


def _begin(job: Job, before: dict[str, Any] | None) -> None:
    """Write the tokenizer and the plan, unless an interrupted run has written the same; remove files of another one."""
    partial, config = job.folder, job.config
    plan = {
        "made_by": made_by(config.data, config.tokenizer) | {"add": before is not None},
        "items": [[identity(i.path), i.size, os.path.exists(i.path) and os.path.getmtime(i.path)] for i in job.items],
    }
    if (partial / "plan.json").exists():
        old = json.loads((partial / "plan.json").read_text(encoding="utf-8"))
        if old == plan:
            if config.shards == 1:
                for path in (partial / "units").glob(".*"):  # incomplete units of killed processes
                    shutil.rmtree(path)
            return
        why = differences(old["made_by"], plan["made_by"]) or "other input files"
        print(f"removing the files of an interrupted run for {config.data.path}: it was made with {why}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write_tokenizer(job, before)
    except BaseException:
        shutil.rmtree(partial)
        raise
    write_atomically(partial / "plan.json", json.dumps(plan))


def _write_tokenizer(job: Job, before: dict[str, Any] | None) -> None:
    """Copy or train the tokenizer; raise `DataError` if it does not fit the settings."""
    data, config, folder = job.config.data, job.config.tokenizer, job.folder / "tokenizer"
    template = None if data.style is Style.text else read_template(data.chat_template)
    if before is not None or config.model is not None:
        tokenizer = load_tokenizer(Path(data.path) / "tokenizer" if before is not None else str(config.model))
        if before is None and (problem := export_problem(tokenizer)):
            logger.warning("%s", problem)
        save_tokenizer(tokenizer, folder)
        if before is None and config.add_special_tokens:
            tokenizer = add_tokens(folder, config.add_special_tokens)
    else:
        print(f"training a tokenizer of {config.vocab_size} pieces", flush=True)
        texts, path = iter([*tokenizer_texts(data, job.items, config.train_bytes)]), folder / "tokenizer.model"
        special = list(dict.fromkeys([*MARKERS.get(template or "", ()), *config.add_special_tokens]))
        tokenizer = train_tokenizer(texts, path, vocab_size=config.vocab_size, threads=job.workers, special=special)
    for key, token in (("add_bos", tokenizer.bos_id), ("add_eos", tokenizer.eos_id)):
        if getattr(config, key) and token is None:
            raise DataError(f"tokenizer.{key} (true): {tokenizer.path.name} has no such token; set it to false")
    if template is not None:
        if ChatEncoder(template, tokenizer).answer_end() is None:
            problem = "ends answers with no special token; add one with tokenizer.add_special_tokens"
            logger.warning("data.chat_template (%s) %s", data.chat_template, problem)
        (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")


def tokenizer_texts(config: CorpusConfig, items: list[Item], wanted_bytes: int) -> Iterator[str]:
    """Yield about `wanted_bytes` of training text, from the start of each file in proportion to its size."""
    left_out, reader = LeftOut(config.on_bad_record), Reader(config)
    items = [item for item in items if item.split != "valid"]
    total = sum(item.size for item in items)
    allowed = size = 0.0
    for item in items:
        allowed += wanted_bytes * item.size / total if total else wanted_bytes
        for document in reader.documents(item, left_out) if size < allowed else ():
            if document.split == "train":
                yield document.text
                size += document.text_bytes
            if size >= allowed:
                break
    if not size:
        raise DataError(f"data.source ({config.source.value}) has no training text{left_out.first()}")


def _publish(partial: Path, folder: Path) -> None:
    """Move a finished corpus, or additions to one, into place; safe to repeat after an interruption."""
    shutil.rmtree(partial / "units", ignore_errors=True)
    (partial / "plan.json").unlink(missing_ok=True)
    if not folder.exists():
        partial.rename(folder)
        return
    for path in (*partial.glob("train/*"), *partial.glob("valid/*")):
        target = folder / path.relative_to(partial)
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    (partial / "corpus.json").rename(folder / "corpus.json")  # the commit
    shutil.rmtree(partial)
