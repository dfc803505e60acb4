"""From text to a corpus on disk: encoded by all cores, written in order, committed by one rename.

All is written to a hidden folder beside the corpus. A journal in it says, every few seconds, how far each file
has been written and which blocks of the text that was, so that a run that was killed goes on from there and
ends with the same bytes. Several processes may each do a part; the last one to end commits the whole.
"""

import fcntl
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data.config import DataConfig, DataError, OnBadRecord, Source, Style, TokenizerConfig
from data.encode import Encoded, encoded
from data.read import BadRecords, Block, Document, Item, blocks, digest_of, documents, items
from data.shards import FORMAT_VERSION, Header, Shard, ShardWriter, Written, read_about
from data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer, train_tokenizer

# What training reads of a DataConfig and preparing does not, and what only decides when to stop
OTHER_KEYS = {"name", "path", "seq_len", "pack_len", "packing", "micro_batch_size", "seed", "workers"}
OTHER_KEYS |= {"mix", "tokenizer", "on_bad_record"}
PARTS_A_GENERATION = 1000  # numbers of parts that belong to one run of prepare_data.py


@dataclass(slots=True)
class Counts:
    """What has been written so far, for the progress bar."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


@dataclass(slots=True)
class Journal:
    """Where a part stands.

    Attributes:
        item, block: what comes next of the text.
        open: how far each file that still grows has been written, by stem; `closed` are the finished ones.
        read: size and time of each input file that has been read, to know whether it has changed since.
    """

    item: int = 0
    block: int = 0
    counts: Counts = field(default_factory=Counts)
    bad: dict[str, Any] = field(default_factory=dict)
    open: dict[str, Written] = field(default_factory=dict)
    closed: list[str] = field(default_factory=list)
    read: dict[str, list[float]] = field(default_factory=dict)
    complete: bool = False

    @staticmethod
    def load(path: Path) -> "Journal":
        stored = json.loads(path.read_text())
        stored["counts"] = Counts(**stored["counts"])
        stored["open"] = {stem: Written(**written) for stem, written in stored["open"].items()}
        return Journal(**stored)

    def save(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self)))


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, whenever the machine stops."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def made_by(data: DataConfig, tokenizer: TokenizerConfig) -> dict[str, Any]:
    """Everything that decides what a corpus holds, as JSON."""
    kept = {f"data.{k}": v for k, v in asdict(data).items() if k not in OTHER_KEYS}
    kept |= {f"tokenizer.{k}": v for k, v in asdict(tokenizer).items()}
    if tokenizer.model is not None:
        kept["data.vocab_size"] = kept["tokenizer.vocab_size"] = None  # the model has its own
    for key in ("data.input", "data.valid_input"):
        if data.source is Source.local and kept[key] is not None and "://" not in kept[key]:
            kept[key] = str(Path(kept[key]).absolute())
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
        raise DataError(f"{folder} exists and is no corpus; pass another data.name, or remove it")
    about = read_about(folder)
    if differing := differences(about["made_by"], made_by(data, tokenizer)):
        raise DataError(f"{folder} was made with other settings: {differing}; pass another data.name, or remove it")
    new = _new_items(data, about)
    if new and not add:
        raise DataError(
            f"{len(new)} files of data.input came after {folder} was made, {new[0].path} first; pass add=true to add "
            "them to it, or another data.name"
        )
    return not new


def _new_items(data: DataConfig, about: dict[str, Any]) -> list[Item]:
    """List the files that a corpus was not made of; raises `DataError` if one of those it was made of has changed."""
    if data.source is not Source.local:
        return []
    try:
        found = items(data, BadRecords(OnBadRecord.skip))
    except DataError:
        return []  # the text need not be kept once it is tokens
    for item in found:
        if item.path in about["input"] and about["input"][item.path] != item.size:
            raise DataError(
                f"{item.path} has {item.size} bytes and had {about['input'][item.path]} when {data.path} was made of it; "
                "pass another data.name, or remove the corpus"
            )
    return [item for item in found if item.path not in about["input"]]


def all_documents(data: DataConfig, bad: BadRecords) -> Iterator[Document]:
    """Yield the documents of a corpus, each with its split."""
    number = 0
    for item in items(data, bad):
        for block in blocks(item, data, bad):
            for document in documents(block, data, bad):
                if data.max_documents is not None and number >= data.max_documents:
                    return
                number += 1
                yield document


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
            about = read_about(folder) if add and folder.exists() else None
            everything = items(data, bad)
            todo = everything if about is None else _new_items(data, about)
            _begin(data, tokenizer_config, partial, todo, shards, workers, about)
        part = Part(data, tokenizer_config, partial, shard, bad, generation=about["generations"] if about else 0)
        try:
            part.write(todo, held_out_digests(data, everything), shards, workers, on_progress, save_every_s)
        except (DataError, KeyboardInterrupt):
            part.save_if_whole()
            raise
        finally:
            part.close_files()
        with _locked(folder, "plan"):
            return _commit(data, tokenizer_config, folder, partial, shards, todo, about), part.bad


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
    plan = {"made_by": made_by(data, config) | {"shards": shards, "add": about is not None}}
    if (partial / "plan.json").exists():
        before = json.loads((partial / "plan.json").read_text())
        differing = differences(before["made_by"], plan["made_by"]) or _changed_input(partial)
        if not differing:
            return
        print(f"what an earlier run left of {data.path} is removed, because it was made with {differing}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    tokenizer = _tokenizer(data, config, partial / "tokenizer", workers, about)
    for wanted, token in (("add_bos", tokenizer.bos_id), ("add_eos", tokenizer.eos_id)):
        if getattr(config, wanted) and token is None:
            raise DataError(
                f"tokenizer.{wanted} (true): {tokenizer.path.name} has no such token; pass tokenizer.{wanted}=false"
            )
    write_whole(partial / "plan.json", json.dumps(plan))


def _changed_input(partial: Path) -> str:
    for path in sorted(partial.glob("journal-*.json")):
        for file, (size, modified) in Journal.load(path).read.items():
            if _stamp(file) != [size, modified]:
                return f"another {file}"
    return ""


def _stamp(path: str) -> list[float]:
    """Give what tells whether a file has changed: its size and time."""
    if "://" in path or not Path(path).exists():
        return [0, 0]
    return [Path(path).stat().st_size, Path(path).stat().st_mtime]


class Part:
    """One process' share of the work: its journal and its files."""

    def __init__(
        self, data: DataConfig, config: TokenizerConfig, folder: Path, shard: int, bad: BadRecords, *, generation: int
    ) -> None:
        self.data, self.config, self.folder, self.shard = data, config, folder, shard
        self.number = generation * PARTS_A_GENERATION + shard
        self.path = folder / f"journal-{shard:03d}.json"
        self.journal = Journal.load(self.path) if self.path.exists() else Journal()
        self.bad = BadRecords(bad.policy, **self.journal.bad) if self.path.exists() else bad
        self.tokenizer = load_tokenizer(folder / "tokenizer")
        self._cut_back()
        self.writers = {self._group(stem): self._writer(stem, written) for stem, written in self.journal.open.items()}
        self.done_since: list[ShardWriter] = []
        self.unread = BadRecords(bad.policy)  # what could not be read since the last block that was
        self.whole = True  # everything that was begun has been written

    def _cut_back(self) -> None:
        """Remove the files that the journal does not know: they are of after its last entry."""
        for path in self.folder.glob(f"*/*-{self.number:05d}-*"):
            stem = f"{path.parent.name}/{path.name.split('.')[0]}"
            if (stem not in self.journal.open and stem not in self.journal.closed) or (
                stem in self.journal.open and path.suffix in (".idx", ".json")
            ):
                path.unlink()

    @staticmethod
    def _group(stem: str) -> tuple[str, str]:
        split, name = stem.split("/")
        return split, name.rsplit("-", 2)[0]

    def _writer(self, stem: str, written: Written | None = None) -> ShardWriter:
        return ShardWriter(
            self.folder / stem,
            vocab_size=self.tokenizer.vocab_size,
            tokenizer=self.tokenizer.fingerprint,
            masked=self.data.style is not Style.text,
            written=written,
        )

    def write(
        self,
        todo: list[Item],
        held_out: frozenset[int],
        shards: int,
        workers: int,
        on_progress: Callable[[Counts], None],
        save_every_s: float,
    ) -> None:
        """Encode and write what is left of this part."""
        if self.journal.complete:
            return
        places: deque[tuple[int, int, BadRecords]] = deque()  # of the blocks that are on their way
        found = encoded(
            self._blocks(todo, shards, places),
            self.data,
            self.config,
            self.folder / "tokenizer",
            held_out,
            workers=workers,
        )
        saved = time.monotonic()
        for block in found:
            item, number, bad = places.popleft()
            self.whole = False
            self._add(block)
            self.bad.merge(bad)
            self.journal.item, self.journal.block = item, number + 1
            self.whole = block.ends
            on_progress(self.journal.counts)
            if self.whole and time.monotonic() - saved >= save_every_s:
                self._save()
                saved = time.monotonic()
            if self.data.max_documents is not None and self.journal.counts.documents >= self.data.max_documents:
                break
        self.whole = False
        self.bad.merge(self.unread)
        for group in list(self.writers):
            self._finish(group)
        self.journal.complete = True
        self._save()

    def _blocks(self, todo: list[Item], shards: int, places: deque[tuple[int, int, BadRecords]]) -> Iterator[Block]:
        """Yield the blocks of this part from where the journal stands."""
        for place, (item, (first, step)) in enumerate(zip(todo, shares(todo, shards, self.shard), strict=True)):
            if first < 0 or place < self.journal.item:
                continue
            skip = self.journal.block if place == self.journal.item else 0
            if "://" not in item.path and item.dataset is None:
                self.journal.read[item.path] = _stamp(item.path)
            whole = 0  # the number of the block that a document in parts began with: one part takes all of it
            for number, block in enumerate(blocks(item, self.data, self.unread, skip=skip), skip):
                whole = number if block.begins else whole
                if whole % step == first:
                    places.append((place, number, replace(self.unread)))
                    self.unread.count, self.unread.empty, self.unread.places = 0, 0, []
                    yield block

    def _add(self, block: Encoded) -> None:
        left = len(block.order)
        if self.data.max_documents is not None:
            left = self.data.max_documents - self.journal.counts.documents
        for key, group in block.groups.items():
            count = block.order[:left].count(key)
            if not count:
                continue
            lengths = group.lengths[:count]
            n_tokens, text_bytes = int(lengths.sum()), int(group.text_bytes[:count].sum())
            writer = self.writers.get(key) or self._next(key)
            writer.add_many(group.ids[:n_tokens], lengths, text_bytes, ends=block.ends)
            self.journal.counts.documents += count - (not block.ends)
            self.journal.counts.tokens += n_tokens
            self.journal.counts.text_bytes += text_bytes
            if writer.full:
                self._finish(key)
        self.bad.merge(block.bad)

    def _next(self, key: tuple[str, str]) -> ShardWriter:
        """Begin the next file of a split and source."""
        split, source = key
        before = sum(self._group(stem) == key for stem in self.journal.closed)
        self.writers[key] = self._writer(f"{split}/{source}-{self.number:05d}-{before:05d}")
        return self.writers[key]

    def _finish(self, key: tuple[str, str]) -> None:
        writer = self.writers.pop(key)
        writer.close()
        self.journal.closed.append(f"{key[0]}/{writer.stem.name}")
        self.done_since.append(writer)

    def _save(self) -> None:
        for writer in self.writers.values():
            writer.sync()
        self.journal.open = {f"{w.stem.parent.name}/{w.stem.name}": w.written for w in self.writers.values()}
        self.journal.bad = {"count": self.bad.count, "empty": self.bad.empty, "places": self.bad.places}
        self.journal.save(self.path)
        for writer in self.done_since:
            writer.forget()
        self.done_since = []

    def save_if_whole(self) -> None:
        """Keep what has been done, unless it was interrupted in the middle of a block."""
        if self.whole:
            self._save()

    def close_files(self) -> None:
        for writer in self.writers.values():
            writer.close_files()


def shares(todo: list[Item], shards: int, shard: int) -> list[tuple[int, int]]:
    """Give for each item which of its blocks a part takes: (first, step), and (-1, 1) for none.

    Each part has an equal share of all bytes or records, laid end to end. Parts that meet in an item each
    read it and take their turn of its blocks, because what is compressed can only be read from its beginning.
    """
    sizes = [max(1, item.size or (len(item.dataset) if hasattr(item.dataset, "__len__") else 0)) for item in todo]
    total, end, found = sum(sizes), 0, []
    for size in sizes:
        parts = range(end * shards // total, ((end + size) * shards - 1) // total + 1)
        found.append((shard - parts.start, len(parts)) if shard in parts else (-1, 1))
        end += size
    return found


def held_out_digests(data: DataConfig, everything: list[Item]) -> frozenset[int]:
    """Hash what is held out whole, so that no training document is also one of validation.

    Where documents are held out by their hash, equal ones are on the same side without this.
    """
    quiet = BadRecords(OnBadRecord.skip)
    held_out = (item for item in everything if item.split == "valid")
    found = (
        document
        for item in held_out
        for block in blocks(item, data, quiet)
        for document in documents(block, data, quiet)
    )
    return frozenset(digest_of(document, data) for document in found if document.begins and document.ends)


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
    if before is None and not any(stem.startswith("train/") for stem in stems):
        shutil.rmtree(partial)
        raise DataError(f"there is no training document in data.source ({data.source.value}); nothing was written")
    about = describe(
        data, config, partial, stems, {item.path: item.size for item in todo if item.dataset is None}, before
    )
    for path in [*journals, partial / "plan.json", *partial.glob(".*.partial")]:
        path.unlink()
    if before is None:
        write_whole(partial / "corpus.json", json.dumps(about, indent=2) + "\n")
        partial.rename(folder)
        return about
    for stem in stems:
        for path in partial.glob(f"{stem}.*"):
            (folder / stem).parent.mkdir(exist_ok=True)
            path.rename(folder / path.relative_to(partial))
    write_whole(folder / "corpus.json", json.dumps(about, indent=2) + "\n")  # what was moved is part of it from here on
    shutil.rmtree(partial)
    return about


def describe(
    data: DataConfig,
    config: TokenizerConfig,
    folder: Path,
    stems: list[str],
    read: dict[str, int],
    before: dict[str, Any] | None,
) -> dict[str, Any]:
    """Say in JSON what a corpus holds and how it was made; `before` is what it held without these files."""
    splits: dict[str, dict[str, dict[str, Any]]] = before["splits"] if before else {"train": {}, "valid": {}}
    for stem in sorted(stems):
        split, source = Part._group(stem)
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
        "input": (before["input"] if before else {}) | read,
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "add_bos": config.add_bos,
            "add_eos": config.add_eos,
        },
        "splits": {split: dict(sorted(sources.items())) for split, sources in splits.items()},
    }


def _tokenizer(
    data: DataConfig, config: TokenizerConfig, folder: Path, workers: int, about: dict[str, Any] | None
) -> Tokenizer:
    if about is not None:
        save_tokenizer(load_tokenizer(Path(data.path) / "tokenizer"), folder)
        return load_tokenizer(folder)
    if config.model is not None:
        save_tokenizer(load_tokenizer(config.model), folder)
        return load_tokenizer(folder)
    texts = _tokenizer_texts(data, config.train_bytes)
    return train_tokenizer(texts, folder / "tokenizer.model", vocab_size=config.vocab_size, threads=workers)


def _tokenizer_texts(data: DataConfig, limit: int) -> Iterator[str]:
    """Yield about `limit` bytes of training text: all of it, or documents taken evenly by their hash.

    Bad records are told when the text is encoded, not here.
    """
    kept: list[tuple[int, str]] = []
    share, size = 1 << 64, 0
    for document in all_documents(data, BadRecords(OnBadRecord.skip)):
        digest = xxhash.xxh3_64_intdigest(document.text.encode(), seed=1)
        if document.split == "train" and digest < share:
            kept.append((digest, document.text))
            size += len(document.text.encode())
        while size > 2 * limit and len(kept) > 1:
            share //= 2
            kept = [(digest, text) for digest, text in kept if digest < share]
            size = sum(len(text.encode()) for _, text in kept)
    share = int(share * min(1.0, limit / max(1, size)))
    yield from (text for digest, text in kept if digest < share or len(kept) == 1)


def sample_texts(data: DataConfig, number: int, *, max_tokens: int) -> Iterator[tuple[str, str]]:
    """Yield the beginnings of a few prepared documents, decoded again, with their source: what will be trained on."""
    folder = Path(data.path)
    tokenizer = load_tokenizer(folder / "tokenizer")
    train = read_about(folder)["splits"]["train"]
    shards = [(source, Shard(folder / counts["shards"][0])) for source, counts in train.items()]
    shards = [(source, shard) for source, shard in shards if shard.n_documents]
    for i in range(number):
        source, shard = shards[i % len(shards)]
        ids = shard.document((i + 1) * shard.n_documents // (number + 1)).astype(np.int64)
        ids = (ids & 0x7FFFFFFF).tolist()
        yield source, tokenizer.decode(ids[:max_tokens]) + (" ..." if len(ids) > max_tokens else "")
