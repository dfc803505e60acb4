"""Samples of a corpus: text to train a tokenizer on, and prepared documents to look at."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from corpus.config import CorpusConfig, DataError
from corpus.documents import Document
from corpus.inputs import Item
from corpus.left_out import LeftOut
from corpus.readers import Reader
from data.manifest import read_manifest
from data.shards import LOSS_MASKED, Shard
from data.tokenizer import INCOMPLETE, load_tokenizer

SAMPLED_FROM = 32  # times the wanted text is read
LEAST_BYTES = 1 << 20  # of each file


def tokenizer_texts(config: CorpusConfig, items: list[Item], wanted_bytes: int) -> list[str]:
    """Return about `wanted_bytes` of training text: all of it, or documents drawn evenly by their hash.

    Of a corpus much larger than that, only the beginning of each file is read.
    """
    left_out = LeftOut(config.on_bad_record)
    taken: dict[int, str] = {}  # by hash, without duplicates
    share, size = 1 << 64, 0
    for document in _beginnings(config, items, SAMPLED_FROM * wanted_bytes, left_out):
        digest = xxhash.xxh3_64_intdigest(document.text.encode(), seed=config.valid_seed + 1)
        if document.split == "train" and digest < share and digest not in taken:
            taken[digest] = document.text
            size += document.text_bytes
        while size > 2 * wanted_bytes and len(taken) > 1:
            share //= 2
            taken = {digest: text for digest, text in taken.items() if digest < share}
            size = sum(len(text.encode()) for text in taken.values())
    share = int(share * min(1.0, wanted_bytes / max(1, size)))
    if not taken:
        raise DataError(f"data.source ({config.source.value}) has no training text{left_out.first()}")
    return [text for digest, text in taken.items() if digest < share] or [min(taken.items())[1]]


def _beginnings(config: CorpusConfig, items: list[Item], limit: int, left_out: LeftOut) -> Iterator[Document]:
    """Yield the documents of items, of each in proportion to its size if they have more than `limit` bytes."""
    total, number = sum(item.size for item in items), 0
    reader = Reader(config)
    for item in items:
        most, size = (max(limit * item.size / total, LEAST_BYTES) if total > limit else limit), 0
        for document in reader.documents(item, left_out):
            if number == config.max_documents:
                return
            yield document
            number, size = number + 1, size + document.text_bytes
            if size >= most:
                break


def sample_texts(config: CorpusConfig, number: int, *, max_tokens: int) -> Iterator[tuple[str, str]]:
    """Yield (source, text) of the beginnings of a few prepared documents, decoded."""
    folder = Path(config.path)
    tokenizer = load_tokenizer(folder / "tokenizer")
    train = read_manifest(folder)["splits"]["train"]
    shards = [(source, Shard(folder / counts["shards"][0])) for source, counts in train.items()]
    chosen = [shards[i % len(shards)] for i in range(number)]
    places = ((source, shard, (i + 1) * shard.n_documents // (number + 1)) for i, (source, shard) in enumerate(chosen))
    for source, shard, index in dict.fromkeys(places):  # a small corpus has fewer
        ids = (shard.document(index).astype(np.int64) & (LOSS_MASKED - 1)).tolist()
        text = tokenizer.decode(ids[:max_tokens])
        yield source, text if len(ids) <= max_tokens else text.rstrip(INCOMPLETE) + " ..."
