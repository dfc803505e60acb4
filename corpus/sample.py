"""Samples of a corpus: text to train a tokenizer on, and prepared documents to print."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from corpus.config import CorpusConfig, DataError
from corpus.inputs import Item
from corpus.left_out import LeftOut
from corpus.readers import Reader
from data.manifest import read_manifest
from data.shards import LOSS_MASKED, Shard
from data.tokenizer import INCOMPLETE, load_tokenizer


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


def sample_texts(config: CorpusConfig, number: int, *, max_tokens: int) -> Iterator[tuple[str, str]]:
    """Yield (source, text) of the decoded start of a document, for the first `number` sources."""
    folder = Path(config.path)
    tokenizer = load_tokenizer(folder / "tokenizer")
    train = read_manifest(folder)["splits"]["train"]
    for source, counts in list(train.items())[:number]:
        shard = Shard(folder / counts["shards"][0])
        ids = (shard.document(shard.n_documents // 2).astype(np.int64) & (LOSS_MASKED - 1)).tolist()
        text = tokenizer.decode(ids[:max_tokens])
        yield source, text if len(ids) <= max_tokens else text.rstrip(INCOMPLETE) + " ..."
