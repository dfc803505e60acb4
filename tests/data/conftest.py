"""The small tokenizer of tests, and shards of given tokens."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corpus.config import Source
from data.config import DataConfig
from data.shards import Shard, ShardWriter
from tests.corpus_fixtures import *  # noqa: F403


def write_shard(stem: Path, documents: Sequence[Sequence[int] | np.ndarray], **settings: Any) -> Shard:
    writer = ShardWriter(stem, **{"vocab_size": 100_000, "tokenizer": "t"} | settings)
    for ids in (np.array(document, dtype=np.uint32) for document in documents):
        writer.add(ids, np.array([len(ids)]), len(ids))
    writer.close()
    return Shard(stem, verify=True)


def data_config(path: str | Path = "none", **changes: Any) -> DataConfig:
    plain = DataConfig(name="t", path=str(path), source=Source.local, seq_len=8, micro_batch_size=1, workers=0)
    return dataclasses.replace(plain, **changes)
