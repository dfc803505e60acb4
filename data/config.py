"""Configuration of the data pipeline, which adds batching to `CorpusConfig`. Torch-free."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

from omegaconf import MISSING

from corpus.config import CorpusConfig, DataError, Source

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


@dataclass(kw_only=True, slots=True)
class DataConfig(CorpusConfig):
    seq_len: int = MISSING  # longest attention span, in tokens
    pack_len: int | None = None  # tokens per pack, a multiple of seq_len (null: seq_len)
    packing: str = "concat"  # concat, best_fit, internlm, internlm_one, or module:Class
    mix: dict[str, float] = field(default_factory=dict)  # source -> sampling weight (empty: by size)
    micro_batch_size: int = MISSING  # sequences of seq_len tokens per forward pass
    seed: int = 1024  # order of documents and packs
    tokenizer: str | None = None  # of source=tokens, for bits per byte and decoding
    verify: bool = field(default=False, metadata={"free": True})  # check the hashes of all shards before the first step
    workers: int = field(default=2, metadata={"free": True})  # loader processes; the order does not depend on it
    worker_timeout_s: float = field(default=300.0, metadata={"free": True})  # per batch; 0: none

    @property
    def pack_tokens(self) -> int:
        return self.pack_len or self.seq_len

    @property
    def packs_per_micro_batch(self) -> int:
        return self.micro_batch_size * self.seq_len // self.pack_tokens

    def problems(self) -> Iterator[str]:
        yield from CorpusConfig.problems(self)  # super() does not work in a dataclass with slots
        if self.source is Source.tokens and self.input is None:
            yield "data.input is not set; name the folder of .bin files that data.source=tokens reads"
        wrong = {name: weight for name, weight in self.mix.items() if not 0 <= weight < float("inf")}
        yield from (f"data.mix.{name} ({weight}) must be 0 or more" for name, weight in wrong.items())
        if self.mix and not wrong and not any(self.mix.values()):
            yield f"data.mix ({self.mix}) needs a weight above 0"
        least = {"seq_len": 2, "micro_batch_size": 1, "workers": 0, "worker_timeout_s": 0, "seed": 0}
        small = [key for key, limit in least.items() if getattr(self, key) < limit]
        yield from (f"data.{key} ({getattr(self, key)}) must be at least {least[key]}" for key in small)
        if self.seed >= 2**32:
            yield f"data.seed ({self.seed}) must be below 2**32"
        if self.pack_len is None or {"seq_len", "micro_batch_size"} & set(small):
            return
        if self.pack_len < 1 or self.pack_len % self.seq_len:
            yield f"data.pack_len ({self.pack_len}) must be a multiple of data.seq_len ({self.seq_len})"
        elif self.micro_batch_size * self.seq_len % self.pack_len:
            tokens = f"data.micro_batch_size ({self.micro_batch_size}) x data.seq_len ({self.seq_len})"
            yield f"{tokens} must be a multiple of data.pack_len ({self.pack_len})"


TRAINING_ONLY = {f.name for f in fields(DataConfig)} - {f.name for f in fields(CorpusConfig)}


def fitting_vocab_size(config: DataConfig) -> int:
    """Return the value of `model.vocab_size=auto`: the data's vocabulary, or `data.vocab_size` before preparation."""
    size = config.vocab_size
    if config.source not in (Source.random, Source.tokens):
        with suppress(OSError, ValueError, KeyError, TypeError):  # reported when the data is opened
            size = int(json.loads((Path(config.path) / "corpus.json").read_bytes())["tokenizer"]["vocab_size"])
    return -(-size // 128) * 128  # so that tensor parallelism divides it


def check_tokenizer(name: str | Path, key: str = "tokenizer.model") -> None:
    """Raise `DataError` if a name is a path, not a Hugging Face name, and no tokenizer is there."""
    path = Path(name)
    if path.is_dir():
        if not any((path / file).exists() for file in TOKENIZER_FILES):
            raise DataError(f"{key} ({name}) has neither {' nor '.join(TOKENIZER_FILES)}")
    elif not path.is_file() and (path.suffix in (".model", ".json") or len(path.parts) > 2):
        raise DataError(f"{key} ({name}) does not exist; name a tokenizer's file or folder, or a Hugging Face name")


@dataclass(kw_only=True, slots=True)
class RampConfig:
    """Batch-size ramp-up: `start_tokens`, then `increment_tokens` more every `every_steps` steps."""

    start_tokens: int | None = None  # null: no ramp
    increment_tokens: int = 0
    every_steps: int = 0


def packs_of_step(step: int, *, global_batch_tokens: int, ramp: RampConfig, pack_tokens: int) -> int:
    """Return the number of packs in the batch of `step`, counted from 0, with the ramp-up."""
    tokens = global_batch_tokens
    if ramp.start_tokens is not None:
        tokens = min(tokens, ramp.start_tokens + ramp.increment_tokens * (step // ramp.every_steps))
    return tokens // pack_tokens


def parse_ranges(parts: list[str]) -> list[range]:
    """Parse ["17", "100-120"] into ranges of steps, counted from 1, ends included; raise ValueError if malformed."""
    ranges = []
    for part in parts:
        first, _, last = part.partition("-")
        ranges.append(range(int(first), int(last or first) + 1))
        if not ranges[-1] or ranges[-1][0] < 1:
            raise ValueError(part)
    return ranges


def plain_name(source: str) -> str:
    """Return the name of a source such as "Wikipedia (en)" that a command line can have: `wikipedia_en`."""
    return re.sub(r"[^\w.+-]+", "_", source.lower()).strip("_.")
