"""From text to a corpus on disk: encoded by all cores, written in order, committed by one rename.

All is written to a hidden folder beside the corpus. A journal in it says, every few seconds, how far each file
has been written and which blocks of the text that was, so that a run that was killed goes on from there and
ends with the same bytes. Several processes may each do a part; the last one to end commits the whole.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from corpus.chat import ChatEncoder, markers, read_template
from corpus.config import DataError, OnBadRecord, Source, Style, TokenizerConfig
from corpus.inputs import BadRecords, Item, items
from corpus.journal import Counts, Journal, changed_input, write_whole
from corpus.part import Part, group_of
from corpus.texts import held_out_digests, tokenizer_texts
from data.config import TRAINING_ONLY, DataConfig
from data.manifest import read_manifest
from data.shards import FORMAT_VERSION, Header, Shard
from data.tokenizer import CHAT_TEMPLATE, Tokenizer, export_problem, load_tokenizer, save_tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

# What does not decide what a corpus holds: where it is, how it is trained on, when to stop
OTHER_KEYS = {"name", "path", "on_bad_record", *TRAINING_ONLY}


def made_by(data: DataConfig, tokenizer: TokenizerConfig) -> dict[str, Any]:
    """Everything that decides what a corpus holds, as JSON."""
    kept = {f"data.{k}": v for k, v in asdict(data).items() if k not in OTHER_KEYS}
    kept |= {f"tokenizer.{k}": v for k, v in asdict(tokenizer).items()}
    if tokenizer.model is not None:
        kept["data.vocab_size"] = kept["tokenizer.vocab_size"] = None  # the model has its own
    for key in ("data.input", "data.valid_input"):
        if data.source is Source.local and kept[key] is not None and "://" not in kept[key]:
            kept[key] = str(Path(kept[key]).absolute())
    named = data.sources.items()
    kept["data.sources"] = {name: path if "://" in path else str(Path(path).absolute()) for name, path in named}
    return {key: getattr(value, "value", value) for key, value in kept.items()}


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Say in what two `made_by` differ; nothing if they do not."""
    return ", ".join(f"{key} ({before.get(key)}, now {now.get(key)})" for key in now if before.get(key) != now.get(key))


def existing(data: DataConfig, tokenizer: TokenizerConfig, *, add: bool = False) -> bool:
    """Say whether this very corpus is there already; raises `DataError` if another one is in its place.

    Files that were added to its text since are told too; with `add` they are what is still to be done.
    """
    folder = Path(data.path)
    if not folder.exists():
        return False
    if not (folder / "corpus.json").exists():
        raise DataError(f"{folder} exists and is no corpus; pass another data.name or data.path, or remove it")
    about = read_manifest(folder)
    if differing := differences(about["made_by"], made_by(data, tokenizer)):
        raise DataError(
            f"{folder} was made with other settings: {differing}; pass another data.name or data.path, or remove it"
        )
    left_out = BadRecords(OnBadRecord.skip)
    new = _new_items(data, about, left_out)
    if new and not add:
        raise DataError(
            f"{len(new)} files of data.input came after {folder} was made, {new[0].path} first; pass add=true to add "
            "them to it, or another data.name or data.path"
        )
    if add and not new and left_out.count:
        items(data, BadRecords(data.on_bad_record), known=about["input"])  # which is an error, or they are told here
        print("\n".join(f"{place}; it was left out" for place in left_out.places))
    if add and not new and (passed_over := left_out.passed_over_line()):
        print(passed_over)
    return not new


def _new_items(data: DataConfig, about: dict[str, Any], bad: BadRecords) -> list[Item]:
    """List the files that a corpus was not made of; raises `DataError` if one of those it was made of has changed."""
    if data.source is not Source.local:
        return []
    try:
        found = items(data, bad, known=about["input"])
    except DataError:
        return []  # the text need not be kept once it is tokens
    for item in found:
        if item.path in about["input"] and about["input"][item.path] != item.size:
            raise DataError(
                f"{item.path} has {item.size} bytes and had {about['input'][item.path]} when {data.path} was made of "
                "it; pass another data.name or data.path, or remove the corpus"
            )
    new = [item for item in found if item.path not in about["input"]]
    held_out = {item.path for item in found if item.split == "valid"}
    if more := sorted(held_out - set(about["held_out"])):
        raise DataError(
            f"{more[0]} came to data.valid_input after {data.path} was made, and its documents may have been trained "
            "on; take it out again, or pass another data.name or data.path"
        )
    if new and (gone := sorted(set(about["held_out"]) - held_out)):
        raise DataError(
            f"{gone[0]} is held out from {data.path} and is not there any more, so nothing tells whether new documents "
            "are in it too; put it back, or pass another data.name or data.path"
        )
    return new


def prepare(
    data: DataConfig,
    tokenizer_config: TokenizerConfig,
    *,
    workers: int,
    on_progress: Callable[[Counts], None],
    shards: int = 1,
    shard: int = 0,
    add: bool = False,
    save_every_s: float = 20.0,
) -> tuple[dict[str, Any] | None, BadRecords]:
    """Write part `shard` of `shards` of the corpus at `data.path`; give what could not be read.

    Gives also the description of the corpus if this was the last part to be done, and None otherwise.
    """
    folder = Path(data.path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    with _locked(folder, f"part-{shard}", f"{folder} is being prepared by another process; wait for it"):
        bad = BadRecords(data.on_bad_record)
        with _locked(folder, "plan"):
            if (partial / "corpus.json").exists():  # an earlier run was stopped while it moved what it had finished
                _publish(partial, folder)
                if existing(data, tokenizer_config, add=add):
                    return read_manifest(folder), bad
            about = read_manifest(folder) if add and folder.exists() else None
            everything = items(data, bad, known=about["input"] if about else ())
            if shard:
                bad.clear()  # the first part tells it
            elif passed_over := bad.passed_over_line():
                print(passed_over)
            todo = everything if about is None else _new_items(data, about, BadRecords(OnBadRecord.skip))
            _begin(data, tokenizer_config, partial, todo, shards, workers, about)
        part = Part(data, tokenizer_config, partial, shard, bad, generation=about["generations"] if about else 0)
        try:
            part.write(todo, held_out_digests(data, everything), shards, workers, on_progress, save_every_s)
        except (DataError, KeyboardInterrupt):
            part.save_if_whole()
            if shards == 1 and tokenizer_config.model is not None and not part.has_written:
                shutil.rmtree(partial)  # there is nothing to go on with
            raise
        finally:
            part.close_files()
        with _locked(folder, "plan"):
            return _commit(data, tokenizer_config, folder, partial, shards, todo, about), part.bad


def _at_work(partial: Path) -> int:
    """Count the parts that are being written now, this process' own not among them."""
    count = -1
    for path in partial.parent.glob(f"{partial.name.removesuffix('.partial')}.part-*.lock"):
        with path.open("r+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                count += 1
    return count


@contextmanager
def _locked(folder: Path, name: str, refusal: str | None = None) -> Iterator[None]:
    """Hold a lock beside a folder; wait for it, or if there is a `refusal` raise that."""
    path = folder.parent / f".{folder.name}.{name}.lock"
    while True:
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
            except BlockingIOError:
                raise DataError(str(refusal)) from None
            if not path.exists() or path.stat().st_ino != os.fstat(lock.fileno()).st_ino:
                continue  # whoever held it has removed it, and it is no lock any more
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _begin(
    data: DataConfig,
    config: TokenizerConfig,
    partial: Path,
    todo: list[Item],
    shards: int,
    workers: int,
    about: dict[str, Any] | None,
) -> None:
    """Lay the ground: go on with what an earlier run left, if it was this very work, or begin anew."""
    plan = {
        "made_by": made_by(data, config) | {"shards": shards, "add": about is not None},
        "items": [[item.path, item.size] for item in todo],
    }
    if (partial / "plan.json").exists():
        before = json.loads((partial / "plan.json").read_text())
        differing = differences(before["made_by"], plan["made_by"]) or changed_input(partial)
        if not differing and before["items"] != plan["items"]:
            differing = f"{len(before['items'])} inputs, now {len(todo)}, or others"
        if not differing:
            return
        if n_others := _at_work(partial):
            raise DataError(
                f"{n_others} other processes prepare {data.path} with {differing}; wait for them, or end them first"
            )
        print(f"what an earlier run left of {data.path} is removed, because it was made with {differing}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write_tokenizer(data, config, partial, todo, workers, about)
    except BaseException:
        shutil.rmtree(partial)  # nothing in it could be gone on with
        raise
    write_whole(partial / "plan.json", json.dumps(plan))


def _write_tokenizer(
    data: DataConfig,
    config: TokenizerConfig,
    partial: Path,
    todo: list[Item],
    workers: int,
    about: dict[str, Any] | None,
) -> None:
    """Write the tokenizer, with the chat template of conversations; raises `DataError` if they do not go together."""
    tokenizer = _tokenizer(data, todo, config, partial / "tokenizer", workers, about)
    for wanted, token in (("add_bos", tokenizer.bos_id), ("add_eos", tokenizer.eos_id)):
        if getattr(config, wanted) and token is None:
            raise DataError(
                f"tokenizer.{wanted} (true): {tokenizer.path.name} has no such token; pass tokenizer.{wanted}=false"
            )
    if data.style is not Style.text:
        ChatEncoder(read_template(data.chat_template), tokenizer)  # which says if they do not go together
        (partial / "tokenizer" / CHAT_TEMPLATE).write_text(read_template(data.chat_template), encoding="utf-8")


def _commit(
    data: DataConfig,
    config: TokenizerConfig,
    folder: Path,
    partial: Path,
    shards: int,
    todo: list[Item],
    before: dict[str, Any] | None,
) -> dict[str, Any] | None:
    """Make the corpus of what is written, if all parts are; None if some are not."""
    journals = [partial / f"journal-{shard:03d}.json" for shard in range(shards)]
    if not all(path.exists() and Journal.load(path).complete for path in journals):
        return None
    stems = [stem for path in journals for stem in Journal.load(path).closed]
    left_out = BadRecords(data.on_bad_record)
    for path in journals:
        left_out.merge(BadRecords(data.on_bad_record, **Journal.load(path).bad))
    if before is None and not any(stem.startswith("train/") for stem in stems):
        shutil.rmtree(partial)
        why = f": {left_out.count} bad records were left out, the first {left_out.places[0]}" if left_out.count else ""
        raise DataError(f"there is no training document in data.source ({data.source.value}){why}")
    about = describe(data, config, partial, stems, [item for item in todo if item.dataset is None], left_out, before)
    write_whole(partial / "corpus.json", json.dumps(about, indent=2) + "\n")
    _publish(partial, folder)
    return about


def _publish(partial: Path, folder: Path) -> None:
    """Move what is finished to its place; if this is interrupted it can be done again."""
    only_to_go_on = ("*/*.lengths", "journal-*.json", ".*.partial", "plan.json")
    for path in [path for pattern in only_to_go_on for path in partial.glob(pattern)]:
        path.unlink()
    if not folder.exists():
        partial.rename(folder)
        return
    for split in ("train", "valid"):
        for path in partial.glob(f"{split}/*"):
            (folder / split).mkdir(exist_ok=True)
            path.rename(folder / split / path.name)
    (partial / "corpus.json").rename(folder / "corpus.json")  # what was moved is part of it from here on
    shutil.rmtree(partial)


def describe(
    data: DataConfig,
    config: TokenizerConfig,
    folder: Path,
    stems: list[str],
    read: list[Item],
    left_out: BadRecords,
    before: dict[str, Any] | None,
) -> dict[str, Any]:
    """Say in JSON what a corpus holds and how it was made; `before` is what it held without these files."""
    everything_left_out = BadRecords(data.on_bad_record, **(before["left_out"] if before else {}))
    everything_left_out.merge(left_out)
    splits: dict[str, dict[str, dict[str, Any]]] = before["splits"] if before else {"train": {}, "valid": {}}
    for stem in sorted(stems):
        split, source = group_of(stem)
        header = Header(**json.loads((folder / f"{stem}.json").read_text()))
        counts = splits[split].setdefault(source, {"documents": 0, "tokens": 0, "text_bytes": 0, "shards": []})
        for key in ("documents", "tokens", "text_bytes"):
            counts[key] += getattr(header, key)
        counts["shards"].append(stem)
    tokenizer = load_tokenizer(folder / "tokenizer")
    return {
        "format_version": FORMAT_VERSION,
        "made_by": made_by(data, config),
        "generations": before["generations"] + 1 if before else 1,
        "input": (before["input"] if before else {}) | {item.path: item.size for item in read},
        "held_out": before["held_out"] if before else [item.path for item in read if item.split == "valid"],
        "left_out": everything_left_out.as_json(),
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "add_bos": config.add_bos,
            "add_eos": config.add_eos,
        },
        "splits": {split: dict(sorted(sources.items())) for split, sources in splits.items()},
    }


def _tokenizer(
    data: DataConfig,
    todo: list[Item],
    config: TokenizerConfig,
    folder: Path,
    workers: int,
    about: dict[str, Any] | None,
) -> Tokenizer:
    if about is not None:
        save_tokenizer(load_tokenizer(Path(data.path) / "tokenizer"), folder)
        return load_tokenizer(folder)
    if config.model is not None:
        tokenizer = load_tokenizer(config.model)
        if problem := export_problem(tokenizer):
            logger.warning("%s", problem)
        save_tokenizer(tokenizer, folder)
        return load_tokenizer(folder)
    special = () if data.style is Style.text else markers(read_template(data.chat_template))
    print(f"training a tokenizer of {config.vocab_size} pieces", flush=True)
    texts, path = tokenizer_texts(data, todo, config.train_bytes), folder / "tokenizer.model"
    return train_tokenizer(iter(texts), path, vocab_size=config.vocab_size, threads=workers, special=special)


def sample_texts(data: DataConfig, number: int, *, max_tokens: int) -> Iterator[tuple[str, str]]:
    """Yield the beginnings of a few prepared documents, decoded again, with their source: what will be trained on."""
    folder = Path(data.path)
    tokenizer = load_tokenizer(folder / "tokenizer")
    train = read_manifest(folder)["splits"]["train"]
    shards = [(source, Shard(folder / counts["shards"][0])) for source, counts in train.items()]
    shards = [(source, shard) for source, shard in shards if shard.n_documents]
    chosen = [
        (i % len(shards), (i + 1) * shards[i % len(shards)][1].n_documents // (number + 1)) for i in range(number)
    ]
    for which, index in dict.fromkeys(chosen):  # a small corpus has fewer
        source, shard = shards[which]
        ids = (shard.document(index).astype(np.int64) & 0x7FFFFFFF).tolist()
        yield source, tokenizer.decode(ids[:max_tokens]) + (" ..." if len(ids) > max_tokens else "")
