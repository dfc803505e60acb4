"""The small tokenizer of tests, and corpora written without the corpus room."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corpus.config import Source
from data.config import DataConfig
from data.shards import Shard, ShardWriter
from data.tokenizer import Tokenizer, encode_documents, save_tokenizer
from tests.corpus_fixtures import *  # noqa: F403


def write_shard(stem: Path, documents: Sequence[Sequence[int] | np.ndarray], **settings: Any) -> Shard:
    writer = ShardWriter(stem, **{"vocab_size": 100_000, "tokenizer": "t"} | settings)
    for ids in (np.array(document, dtype=np.uint32) for document in documents):
        writer.add(ids, np.array([len(ids)]), len(ids))
    writer.close()
    return Shard(stem, verify=True)


def write_corpus(folder: Path, tokenizer: Tokenizer, texts: dict[str, list[str]]) -> Path:
    """Write a prepared corpus; every tenth document of a source is held out."""
    splits: dict[str, dict[str, Any]] = {"train": {}, "valid": {}}
    for source, documents in texts.items():
        for split, held_out in (("train", False), ("valid", True)):
            its = [text for number, text in enumerate(documents) if (number % 10 == 9) is held_out]
            ids = encode_documents(tokenizer, its, add_bos=False, add_eos=True)
            stem = f"{split}/{source}-00000"
            write_shard(folder / stem, ids, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.fingerprint)
            splits[split][source] = {"shards": [stem]}
    save_tokenizer(tokenizer, folder / "tokenizer")
    about: dict[str, Any] = {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
    about |= {"add_bos": False, "add_eos": True}
    (folder / "corpus.json").write_text(json.dumps({"tokenizer": about, "splits": splits}))
    return folder


def data_config(path: str | Path = "none", **changes: Any) -> DataConfig:
    plain = DataConfig(name="t", path=str(path), source=Source.local, seq_len=8, micro_batch_size=1, workers=0)
    return dataclasses.replace(plain, **changes)
