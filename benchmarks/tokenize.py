"""Speed of tokenization: python -m benchmarks.tokenize model=V7_sft.model

Encodes the sources of Python's library and packages (or texts='folder/*.jsonl.zst') with SentencePiece, with Hugging
Face tokenizers and with this project, on one core each, and compares all ids. Then prepares a corpus as prepare_data.py
does, with one process and with one per core. Without model=, trains a tokenizer of pieces=103168 first, which takes a
minute.
"""

import json
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import PrepareConfig
from corpus.config import OnBadRecord, Source, TokenizerConfig
from corpus.documents import LeftOut
from corpus.inputs import list_items
from corpus.prepare import prepare
from corpus.readers import END, Lines, Reader
from data.config import DataConfig
from data.hf_tokenizer import fast_from_sentencepiece
from data.tokenizer import SentencePieceTokenizer, encode_documents, load_tokenizer, train_tokenizer

PILE_BYTES = 825e9
CORES_PER_MACHINE = 64
BATCH = 256  # documents per call
SETTINGS = {"model": "", "pieces": "103168", "texts": "", "megabytes": "64", "compared": "8"}

Encode = Callable[[list[str]], list[Any]]


def read_texts(paths: str | list[str], limit: int) -> Iterator[str]:
    """Yield about `limit` bytes of distinct texts from files."""
    config = DataConfig(
        name="texts", path="none", source=Source.local, input=paths, on_bad_record=OnBadRecord.skip,
        seq_len=2048, micro_batch_size=1,
    )  # fmt: skip
    size, seen, reader, left_out = 0, set(), Reader(config), LeftOut(OnBadRecord.skip)
    for document in (document for item in list_items(config) for document in reader.documents(item, left_out)):
        if size >= limit:
            return
        if document.hash not in seen:
            yield document.text
            seen.add(document.hash)
            size += document.text_bytes


def run(texts: list[str], encode: Encode) -> tuple[float, list[np.ndarray]]:
    """Return the MB per second of CPU time, and the ids."""
    found: list[np.ndarray] = []
    spent = 0.0
    for at in range(0, len(texts), BATCH):
        start = time.process_time()
        ids = encode(texts[at : at + BATCH])
        spent += time.process_time() - start
        found += [np.array(row, dtype=np.uint32) for row in ids]
    return sum(len(text.encode()) for text in texts) / 1e6 / spent, found


def compare(texts: list[str], n_compared: int, model: Path) -> None:
    """Print the speed of three libraries on one core."""
    tokenizer = load_tokenizer(model)
    assert isinstance(tokenizer, SentencePieceTokenizer), "model= must be a SentencePiece model"
    fast = fast_from_sentencepiece(tokenizer)
    project = partial(encode_documents, tokenizer, add_bos=False, add_eos=False)
    encoders: dict[str, tuple[Encode, list[str]]] = {
        "SentencePiece": (partial(tokenizer.model.encode, num_threads=1), texts[:n_compared]),
        "Hugging Face tokenizers": (
            lambda texts: [encoding.ids for encoding in fast.encode_batch_fast(texts, add_special_tokens=False)],
            texts[:n_compared],
        ),
        "this project": (project, texts),
        "this project, warm cache": (project, texts),
    }
    print(f"\n{'one core':26} {'MB/s':>8} {'x SentencePiece':>16} {'documents with other ids':>26}")
    first, expected = 0.0, []
    for name, (encode, subset) in encoders.items():
        speed, found = run(subset, encode)
        first, expected = first or speed, expected or found
        differing = sum(not np.array_equal(a, b) for a, b in zip(expected, found, strict=False))
        print(f"{name:26} {speed:8.2f} {speed / first:16.2f} {differing:14,} of {len(expected):,}")
    all_ids = [tokenizer.model.encode(text) for text in texts[n_compared:]]
    differing = sum(not np.array_equal(a, b) for a, b in zip(all_ids, project(texts[n_compared:]), strict=True))
    print(f"{'this project, other documents':52} {differing:14,} of {len(all_ids):,}")


def corpus_config(folder: Path, name: str) -> DataConfig:
    return DataConfig(
        name=name, path=str(folder / name), source=Source.local, input=str(folder / "texts.jsonl.gz"),
        seq_len=2048, micro_batch_size=1,
    )  # fmt: skip


def reading(folder: Path) -> float:
    """Return the MB/s of reading only, the limit for processes that read the same compressed file."""
    config = corpus_config(folder, "none")
    (item,) = list_items(config)
    start = time.perf_counter()
    size = sum(len(chunk or b"") for _, chunk in Lines(item.path).read(0, END))
    return size / 1e6 / (time.perf_counter() - start)


def pipeline(folder: Path, model: Path, workers: int) -> float:
    """Return the MB/s of prepare_data.py on a compressed file, without its startup."""
    seen: list[tuple[float, int]] = []

    def progress(documents: int, tokens: int, text_bytes: int, _share: float) -> None:
        if text_bytes:
            seen.append((time.perf_counter(), text_bytes))

    config, settings = corpus_config(folder, f"corpus-{workers}"), TokenizerConfig(model=str(model), vocab_size=1)
    prepare(PrepareConfig(data=config, tokenizer=settings, workers=workers), progress)
    return sum(size for _, size in seen[1:]) / 1e6 / (time.perf_counter() - seen[0][0])


def write(texts: list[str], path: Path) -> None:
    import gzip

    with gzip.open(path, "wt", encoding="utf-8", compresslevel=3) as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def main(arguments: list[str]) -> None:
    given = SETTINGS | {key: value for key, _, value in (argument.partition("=") for argument in arguments)}
    if unknown := set(given) - set(SETTINGS):
        sys.exit(f"error: settings are {', '.join(SETTINGS)}, not {', '.join(sorted(unknown))}")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    limit = int(float(given["megabytes"]) * 1e6)
    installed = [sysconfig.get_path(name) for name in ("purelib", "stdlib")]
    texts = list(read_texts(given["texts"] or installed, limit))
    sizes = np.cumsum([len(text.encode()) for text in texts])
    n_compared = int(np.searchsorted(sizes, float(given["compared"]) * 1e6)) + 1
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = Path(given["model"]) if given["model"] else folder / "tokenizer.model"
        if not given["model"]:
            print(f"training a tokenizer of {given['pieces']} pieces", flush=True)
            train_tokenizer(iter(texts), model, vocab_size=int(given["pieces"]), threads=cores)
        print(f"{len(texts):,} documents, {sizes[-1] / 1e6:.1f} MB; SentencePiece on {n_compared:,} of them")
        compare(texts, n_compared, model)
        write(texts, folder / "texts.jsonl.gz")
        limit = reading(folder)
        print(f"\n{'prepare_data.py, jsonl.gz':26} {'MB/s':>8}\n{'reading only':26} {limit:8.2f}")
        speed = 0.0
        for workers in dict.fromkeys((1, cores)):
            speed = pipeline(folder, model, workers)
            print(f"{workers} {'processes' if workers > 1 else 'process':24} {speed:8.2f}")
        hours, largest = (PILE_BYTES / 1e6 / s / 3600 for s in (speed, min(limit, speed / cores * CORES_PER_MACHINE)))
        print(
            f"\n825 GB take {hours:.1f} hours on one machine like this and {hours / 64:.2f} on 64 (shards=64); "
            f"with {CORES_PER_MACHINE} cores each, {largest:.2f} and {largest / 64:.3f}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
