"""Preparation of a corpus in units.

A unit is 4 MB to 1 GB of input. One process reads it, encodes it and writes its tokens to a folder under a temporary
name; renaming the folder is the commit. A killed process loses the unit it was working on.
"""

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote

import numpy as np
import xxhash

from conf.schema import PrepareConfig
from corpus.chat import ChatEncoder, read_template
from corpus.compression import split_suffix
from corpus.config import CorpusConfig, DataError, Source, Style
from corpus.documents import Document, LeftOut
from corpus.inputs import Item
from corpus.readers import END, Reader, dataset_batches, has_lines
from data.shards import LOSS_MASKED
from data.tokenizer import encode_documents, load_tokenizer

# Small units keep many processes busy, large units make few files. Units must not depend on the number of workers.
LEAST_UNIT_BYTES, MOST_UNIT_BYTES, MOST_UNITS = 1 << 22, 1 << 30, 512
MOST_ROW_BYTES = 1 << 27  # per unit of a dataset, which is held in memory
COMPRESSION_RATIO = 4  # assumed when compressed files are split; the last range of a file extends to its end
BATCH_BYTES = 1 << 20  # of text per encoding call
DOCUMENT = np.dtype([("hash", "<u8"), ("tokens", "<u4"), ("text_bytes", "<u4")])

# Called with the documents, tokens and text bytes of a finished unit (0 bytes if an earlier run did it), and its share
# of the work (0 if unknown).
Progress = Callable[[int, int, int, float], None]


@dataclass(frozen=True, slots=True)
class Job:
    """What to prepare, and where."""

    config: PrepareConfig
    folder: Path  # of the unfinished corpus
    items: list[Item]

    @property
    def workers(self) -> int:
        return self.config.workers or len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Span:
    """The documents that start in [start, stop) of an item, in bytes of a file or rows of a dataset."""

    item: int
    start: int = 0
    stop: int = END


@dataclass(frozen=True, slots=True)
class Unit:
    number: int
    spans: tuple[Span, ...]
    rows: bytes = b""  # Arrow stream of a dataset's rows
    size: int = 0  # bytes, or rows
    limit: int | None = None  # maximum number of documents


def plan_units(items: list[Item], config: CorpusConfig) -> Iterator[Unit]:
    """Yield the units of items; a pure function of the items."""
    units = _dataset_units if config.source is Source.huggingface else _file_units
    return (Unit(number, *unit) for number, unit in enumerate(units(items, config)))


def content_size(item: Item) -> int:
    return item.size * (COMPRESSION_RATIO if split_suffix(item.path)[1] and item.dataset is None else 1)


def _file_units(items: list[Item], config: CorpusConfig) -> Iterator[tuple[tuple[Span, ...], bytes, int]]:
    sizes = [content_size(item) for item in items]
    unit_bytes = min(max(sum(sizes) // MOST_UNITS, LEAST_UNIT_BYTES), MOST_UNIT_BYTES)
    spans: list[Span] = []
    total = 0
    for number, (item, size) in enumerate(zip(items, sizes, strict=True)):
        kind, compression = split_suffix(item.path)
        has_ranges = has_lines(item, item.config or config) or (kind == ".parquet" and not compression)
        n_spans = max(1, size // unit_bytes) if has_ranges else 1
        step = -(-size // n_spans)
        for k in range(n_spans):
            spans.append(Span(number, k * step, END if k == n_spans - 1 else (k + 1) * step))
            total += size // n_spans
            if total >= unit_bytes:
                yield tuple(spans), b"", total
                spans, total = [], 0
    if spans:
        yield tuple(spans), b"", total


def _dataset_units(items: list[Item], config: CorpusConfig) -> Iterator[tuple[tuple[Span, ...], bytes, int]]:
    """Yield rows of datasets, read once, by this process; units grow, because the size of a stream is unknown."""
    total = 0
    for number, item in enumerate(items):
        first, batches, size = 0, [], 0
        for batch in dataset_batches(item, config):
            batches.append(batch)
            size += batch.nbytes
            if size >= min(max(total // MOST_UNITS, LEAST_UNIT_BYTES), MOST_ROW_BYTES):
                yield (Span(number, first),), *_as_stream(batches)
                first, total = first + sum(map(len, batches)), total + size
                batches, size = [], 0
        if batches:
            yield (Span(number, first),), *_as_stream(batches)


def _as_stream(batches: list[Any]) -> tuple[bytes, int]:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batches[0].schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
    return sink.getvalue().to_pybytes(), sum(map(len, batches))


def file_name(name: str) -> str:
    """Return an ASCII file name for a source, unique per source: `C#` becomes `C%23`."""
    quoted = quote(name, safe="+")
    return quoted if len(quoted) <= 200 else f"{quoted[:180]}%{xxhash.xxh3_64_hexdigest(name.encode())}"


def unit_folder(folder: Path, number: int) -> Path:
    return folder / "units" / f"{number:06d}"


def read_unit(folder: Path, number: int) -> dict[str, Any] | None:
    """Return the contents of unit.json, or None if the unit is not done."""
    path = unit_folder(folder, number) / "unit.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


class UnitWorker:
    """Reads, encodes and writes units; one per process."""

    def __init__(self, job: Job) -> None:
        self.job, self.data, self.reader = job, job.config.data, Reader(job.config.data)
        self.tokenizer, self.chat = load_tokenizer(job.folder / "tokenizer"), None
        if self.data.style is not Style.text:
            self.chat = ChatEncoder(read_template(self.data.chat_template), self.tokenizer)
            self.token_bytes = self.tokenizer.token_bytes()
        self.dtype = np.uint16 if self.chat is None and self.tokenizer.vocab_size <= 1 << 16 else np.uint32

    def write(self, unit: Unit) -> list[int]:
        """Prepare and commit a unit; return the numbers of documents, tokens and text bytes."""
        final = unit_folder(self.job.folder, unit.number)
        partial = final.with_name(f".{final.name}.{socket.gethostname()}.{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process with the same pid
        partial.mkdir(parents=True)
        try:
            counts = self._write(unit, partial)
            partial.rename(final)
        except OSError:
            if not final.exists():
                raise
            counts = [0, 0, 0]  # another process did it
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return counts

    def _write(self, unit: Unit, folder: Path) -> list[int]:
        left_out = LeftOut(self.data.on_bad_record)
        groups: set[str] = set()
        documents = tokens = text_bytes = 0
        for batch in _batches(self._documents(unit, left_out)):
            batch = batch if unit.limit is None else batch[: unit.limit - documents]
            found = self._encode(batch, left_out)
            groups |= _append(found, folder, self.dtype)
            documents += len(found)
            tokens += sum(len(ids) for _, ids in found)
            text_bytes += sum(document.text_bytes for document, _ in found)
            if documents == unit.limit:
                break
        counts = [documents, tokens, text_bytes]
        about = {"counts": counts, "left_out": left_out.as_json(), "groups": sorted(groups)}
        (folder / "unit.json").write_text(json.dumps(about), encoding="utf-8")
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file)
        return counts

    def _documents(self, unit: Unit, left_out: LeftOut) -> Iterator[Document]:
        import pyarrow

        for span in unit.spans:
            item = self.job.items[span.item]
            if unit.rows:
                yield from self.reader.rows(pyarrow.ipc.open_stream(unit.rows), item, left_out, span.start)
            else:
                yield from self.reader.documents(item, left_out, span.start, span.stop)

    def _encode(self, documents: list[Document], left_out: LeftOut) -> list[tuple[Document, np.ndarray]]:
        """Return the documents and their ids, uint32, with bos, eos, and the loss mask in the highest bit.

        Sets `text_bytes` of conversations to the size of the rendered text.
        """
        config = self.job.config.tokenizer
        if self.chat is None:
            texts, special = [document.text for document in documents], config.special_tokens_in_text
            ends = {"add_bos": config.add_bos, "add_eos": config.add_eos}
            return list(zip(documents, encode_documents(self.tokenizer, texts, **ends, special=special), strict=True))
        bos = self.tokenizer.bos_id if config.add_bos else None
        eos = self.tokenizer.eos_id if config.add_eos else None
        found = []
        for document in documents:
            messages = document.messages or []
            try:
                self.chat.check_written(messages)
                ids_T, mask_T = self.chat.encode(messages)
            except ValueError as error:
                left_out.bad(document.place, str(error))
                continue
            if bos is not None and ids_T[0] != bos:  # unless the template has written it
                ids_T, mask_T = np.insert(ids_T, 0, bos), np.insert(mask_T, 0, False)
            if eos is not None and ids_T[-1] != eos:
                ids_T, mask_T = np.append(ids_T, eos), np.append(mask_T, True)
            document.text_bytes = int(self.token_bytes[ids_T].sum())
            found.append((document, np.where(mask_T, ids_T, ids_T | np.uint32(LOSS_MASKED)).astype(np.uint32)))
        return found


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.text_bytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _append(encoded: list[tuple[Document, np.ndarray]], folder: Path, dtype: Any) -> set[str]:
    """Append documents to the .tokens and .documents files of their split and source; return these groups."""
    groups: dict[str, list[tuple[Document, np.ndarray]]] = {}
    for document, ids in encoded:
        groups.setdefault(f"{document.split}.{document.source}", []).append((document, ids))
    for group, found in groups.items():
        tokens = np.concatenate([ids for _, ids in found]).astype(dtype)
        table = np.array([(d.hash, len(ids), d.text_bytes) for d, ids in found], dtype=DOCUMENT)
        for kind, content in ((".tokens", tokens), (".documents", table)):
            with open(folder / f"{file_name(group)}{kind}", "ab") as file:  # reopened: there may be thousands
                content.tofile(file)
    return set(groups)


def run_units(units: Iterable[Unit], job: Job, progress: Progress) -> int:
    """Do the missing units of this job's shard; return the total number of units."""
    most, shards = job.config.data.max_documents, job.config.shards
    n_units = n_documents = 0
    total = sum(map(content_size, job.items)) / shards if most is None else 0

    def add(unit: Unit, counts: list[int], *, is_new: bool = True) -> None:
        nonlocal n_documents
        n_documents += counts[0]
        progress(counts[0], counts[1], counts[2] * is_new, unit.size / total if total else 0)

    def to_do() -> Iterator[Unit]:
        nonlocal n_units
        for unit in units:
            if most is not None and n_documents >= most:
                return
            unit = replace(unit, limit=None if most is None else most - n_documents)
            n_units += 1
            if unit.number % shards == job.config.shard:
                if (done := read_unit(job.folder, unit.number)) is None:
                    yield unit
                else:
                    add(unit, done["counts"], is_new=False)

    if job.workers == 1 or most is not None:  # sequential: a unit's limit depends on the units before it
        worker = UnitWorker(job)
        for unit in to_do():
            add(unit, worker.write(unit))
    else:
        _run_in_processes(to_do(), job, add)
    return n_units


def _run_in_processes(units: Iterator[Unit], job: Job, add: Callable[..., None]) -> None:
    waiting: dict[Future[list[int]], Unit] = {}

    def wait_for_all_but(most: int) -> None:
        while len(waiting) > most:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                add(waiting.pop(future), future.result())

    with ProcessPoolExecutor(job.workers, get_context("spawn"), _start_worker, (job,)) as pool:
        try:
            for unit in units:
                waiting[pool.submit(_write_unit, unit)] = unit
                wait_for_all_but(job.workers)
            wait_for_all_but(0)
        except BrokenProcessPool:
            raise DataError("a worker process was killed, possibly out of memory; use fewer workers") from None
        except BaseException:
            for process in active_children():
                process.kill()  # do not wait for units in progress
            raise


_worker: list[UnitWorker] = []  # of this process


def _start_worker(job: Job) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is already one process per core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops them
    parent = parent_process()
    assert parent is not None
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # exit with the main process
    _worker[:] = [UnitWorker(job)]


def _write_unit(unit: Unit) -> list[int]:
    return _worker[0].write(unit)
