"""From documents to a corpus on disk: encoded by all cores, written in order, committed by one rename."""

import fcntl
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data.builtin import builtin_documents
from data.config import DataConfig, DataError, Source, TokenizerConfig
from data.corpus import read_about
from data.read import BadRecords, Document, huggingface_documents, local_documents
from data.shards import FORMAT_VERSION, Header, Shard, ShardWriter
from data.tokenizer import Tokenizer, encode_document, load_tokenizer, save_tokenizer, train_tokenizer

# What training reads of a DataConfig and preparing does not
TRAINING_KEYS = {"name", "path", "seq_len", "pack_len", "packing", "micro_batch_size", "seed", "workers"}
BATCH_CHARS = 1 << 19  # of text sent to a worker at a time


@dataclass(slots=True)
class Counts:
    """What has been written so far, for the progress bar."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


def made_by(data: DataConfig, tokenizer: TokenizerConfig) -> dict[str, Any]:
    """Everything that decides what a corpus holds, as JSON."""
    kept = {f"data.{k}": v for k, v in asdict(data).items() if k not in TRAINING_KEYS}
    kept |= {f"tokenizer.{k}": v for k, v in asdict(tokenizer).items()}
    if tokenizer.model is not None:
        kept["data.vocab_size"] = kept["tokenizer.vocab_size"] = None  # the model has its own
    if data.source is Source.local and data.input is not None:
        kept["data.input"] = str(Path(data.input).absolute())
    return {key: getattr(value, "value", value) for key, value in kept.items()}


def existing(data: DataConfig, tokenizer: TokenizerConfig) -> bool:
    """Say whether this very corpus is there already; raises `DataError` if another one is in its place."""
    folder = Path(data.path)
    if not folder.exists():
        return False
    if not (folder / "corpus.json").exists():
        raise DataError(f"{folder} exists and is no corpus; pass another data.name, or remove it")
    before, now = read_about(folder)["made_by"], made_by(data, tokenizer)
    differing = [f"{key} ({before.get(key)}, now {now.get(key)})" for key in now if before.get(key) != now.get(key)]
    if differing:
        raise DataError(
            f"{folder} was made with other settings: {', '.join(differing)}; pass another data.name, or remove it"
        )
    return True


def documents(data: DataConfig, bad: BadRecords) -> Iterator[Document]:
    """Yield the documents of a corpus, each with its split."""
    match data.source:
        case Source.builtin:
            found = builtin_documents()
        case Source.local:
            found = local_documents(data, bad)
        case Source.huggingface:
            found = huggingface_documents(data, bad)
        case Source.random:
            raise AssertionError("random tokens are not prepared")
    for number, document in enumerate(found):
        if data.max_documents is not None and number >= data.max_documents:
            return
        if document.split is None:
            document.split = "valid" if held_out(document, data) else "train"
        yield document


def held_out(document: Document, data: DataConfig) -> bool:
    """Decide by content, so that a document stays where it is when others are added."""
    digest = xxhash.xxh3_64_intdigest((document.key or document.text).encode(), seed=data.valid_seed)
    return digest < data.valid_fraction * 2**64


def prepare(
    data: DataConfig,
    tokenizer_config: TokenizerConfig,
    *,
    workers: int,
    on_progress: Callable[[Counts], None],
) -> tuple[dict[str, Any], BadRecords]:
    """Write the corpus to `data.path` and give its description and what could not be read.

    All is written to a folder of another name beside it, and renamed when it is complete.
    """
    folder = Path(data.path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder} is being prepared by another process; wait for it") from None
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed: nobody else holds the lock
        try:
            about, bad = _write(data, tokenizer_config, partial, workers, on_progress)
            os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        Path(lock.name).unlink()
    return about, bad


def _write(
    data: DataConfig,
    config: TokenizerConfig,
    folder: Path,
    workers: int,
    on_progress: Callable[[Counts], None],
) -> tuple[dict[str, Any], BadRecords]:
    bad = BadRecords(data.on_bad_record)
    folder.mkdir()
    tokenizer = _tokenizer(data, config, folder / "tokenizer", workers)
    for wanted, token in (("add_bos", tokenizer.bos_id), ("add_eos", tokenizer.eos_id)):
        if getattr(config, wanted) and token is None:
            raise DataError(
                f"tokenizer.{wanted} (true): {tokenizer.path.name} has no such token; pass tokenizer.{wanted}=false"
            )
    writers: dict[tuple[str, str], ShardWriter] = {}
    counts = Counts()
    with ExitStack() as opened:
        for document, ids, text_bytes in encoded(documents(data, bad), tokenizer.path, config, workers):
            assert document.split is not None
            place = (document.split, document.source)
            if place not in writers:
                stem = folder / document.split / document.source
                writers[place] = ShardWriter(stem, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.fingerprint)
                opened.callback(writers[place].close_files)
            writers[place].add(ids, text_bytes)
            counts.documents += 1
            counts.tokens += len(ids)
            counts.text_bytes += text_bytes
            on_progress(counts)
    if not any(split == "train" for split, _ in writers):
        raise DataError(f"there is no training document in data.source ({data.source.value}); nothing was written")
    headers = {place: writer.close() for place, writer in writers.items()}
    about = describe(data, config, tokenizer, headers)
    (folder / "corpus.json").write_text(json.dumps(about, indent=2) + "\n")
    return about, bad


def describe(
    data: DataConfig, config: TokenizerConfig, tokenizer: Tokenizer, headers: dict[tuple[str, str], Header]
) -> dict[str, Any]:
    """Say in JSON what a corpus holds and how it was made."""
    splits: dict[str, dict[str, dict[str, int]]] = {"train": {}, "valid": {}}
    for (split, source), header in sorted(headers.items()):
        splits[split][source] = {k: getattr(header, k) for k in ("documents", "tokens", "text_bytes")}
    return {
        "format_version": FORMAT_VERSION,
        "made_by": made_by(data, config),
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "add_bos": config.add_bos,
            "add_eos": config.add_eos,
        },
        "splits": splits,
    }


def _tokenizer(data: DataConfig, config: TokenizerConfig, folder: Path, workers: int) -> Tokenizer:
    if config.model is not None:
        save_tokenizer(load_tokenizer(config.model), folder)
        return load_tokenizer(folder)
    texts = _tokenizer_texts(data, config.train_bytes)
    return train_tokenizer(texts, folder / "tokenizer.model", vocab_size=config.vocab_size, threads=workers)


def _tokenizer_texts(data: DataConfig, limit: int) -> Iterator[str]:
    """Yield about `limit` bytes of training text: all of it, or documents taken evenly by their hash.

    Bad records are told when the text is encoded, not here.
    """
    quiet = BadRecords(data.on_bad_record)
    total = sum(len(d.text.encode()) for d in documents(data, BadRecords(data.on_bad_record)) if d.split == "train")
    share = min(1.0, limit / max(1, total))
    for document in documents(data, quiet):
        digest = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
        if document.split == "train" and int.from_bytes(digest, "little") < share * 2**64:
            yield document.text


_worker: dict[str, Any] = {}


def _start_worker(path: Path) -> None:
    _worker["tokenizer"] = load_tokenizer(path)


def _encode(texts: list[str], add_bos: bool, add_eos: bool) -> list[tuple[np.ndarray, int]]:
    tokenizer = _worker["tokenizer"]
    return [(encode_document(tokenizer, text, add_bos=add_bos, add_eos=add_eos), len(text.encode())) for text in texts]


def encoded(
    found: Iterable[Document], path: Path, config: TokenizerConfig, workers: int
) -> Iterator[tuple[Document, np.ndarray, int]]:
    """Yield documents in order with their ids and bytes, encoded by `workers` processes a little ahead."""
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (path,)) as pool:
        waiting: deque[tuple[list[Document], Future[list[tuple[np.ndarray, int]]]]] = deque()

        def finished() -> Iterator[tuple[Document, np.ndarray, int]]:
            group, future = waiting.popleft()
            for document, (ids, text_bytes) in zip(group, future.result(), strict=True):
                yield document, ids, text_bytes

        for group in _groups(found):
            texts = [document.text for document in group]
            waiting.append((group, pool.submit(_encode, texts, config.add_bos, config.add_eos)))
            for document in group:
                document.text = ""  # the worker has it; only its place is still needed
            while len(waiting) > 2 * workers:
                yield from finished()
        while waiting:
            yield from finished()


def _groups(found: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    size = 0
    for document in found:
        group.append(document)
        size += len(document.text)
        if size >= BATCH_CHARS:
            yield group
            group, size = [], 0
    if group:
        yield group


def sample_texts(data: DataConfig, number: int, *, max_tokens: int) -> Iterator[tuple[str, str]]:
    """Yield the beginnings of a few prepared documents, decoded again, with their source: what will be trained on."""
    folder = Path(data.path)
    tokenizer = load_tokenizer(folder / "tokenizer")
    shards = [Shard(path.with_suffix("")) for path in sorted((folder / "train").glob("*.json"))]
    shards = [shard for shard in shards if shard.header.documents]
    for i in range(number):
        shard = shards[i % len(shards)]
        ids = shard.document((i + 1) * shard.header.documents // (number + 1))
        yield shard.stem.name, tokenizer.decode(ids[:max_tokens].tolist()) + (" ..." if len(ids) > max_tokens else "")
