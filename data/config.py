"""What to train on: where text comes from, how it becomes tokens, how tokens become batches.

One `data` group serves `prepare_data.py` (the first half of the fields) and `train.py` (the second).
Free of torch, so that a wrong value is refused before torch is imported.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path

from omegaconf import MISSING

from corpus.config import CorpusConfig, DataError, Source

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
# What training reads of a DataConfig and preparing does not


class Packing(Enum):
    concat = "concat"  # documents end to end as they lie, cut every pack_len tokens, isolated
    best_fit = "best_fit"  # documents placed whole where they fit best; only longer ones are cut; isolated
    internlm = "internlm"  # InternLM's default: documents shuffled, end to end, isolated
    internlm_one = "internlm_one"  # the same, in samples of seq_len tokens whose documents see each other


@dataclass(kw_only=True, slots=True)
class DataConfig(CorpusConfig):
    """A corpus, and how its tokens become batches."""

    seq_len: int = MISSING  # longest attention span, in tokens
    pack_len: int | None = None  # tokens of a pack, a multiple of seq_len (null: seq_len)
    packing: Packing = Packing.concat
    mix: dict[str, float] = field(default_factory=dict)  # source -> weight in training (empty: by size)
    micro_batch_size: int = MISSING  # sequences of seq_len tokens in one forward pass
    seed: int = 1024  # order of documents and packs
    tokenizer: str | None = None  # tokens: what they were made with, for bits per byte and for reading them
    workers: int = field(default=2, metadata={"free": True})  # loader processes; the order does not depend on it

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
            yield f"data.mix ({self.mix}) must give some source a weight"
        if self.workers < 0:
            yield f"data.workers ({self.workers}) must be 0 or more"
        if not 0 <= self.seed < 2**32:
            yield f"data.seed ({self.seed}) must be in [0, 2**32)"
        if self.seq_len < 2 or self.micro_batch_size < 1:
            if self.seq_len < 2:
                yield f"data.seq_len ({self.seq_len}) must be at least 2"
            if self.micro_batch_size < 1:
                yield f"data.micro_batch_size ({self.micro_batch_size}) must be at least 1"
            return
        if self.pack_len is not None and (self.pack_len < 1 or self.pack_len % self.seq_len):
            yield f"data.pack_len ({self.pack_len}) must be a multiple of data.seq_len ({self.seq_len})"
        elif self.micro_batch_size * self.seq_len % self.pack_tokens:
            yield (
                f"data.micro_batch_size ({self.micro_batch_size}) x data.seq_len ({self.seq_len}) "
                f"must be a multiple of data.pack_len ({self.pack_len})"
            )


def refuse_missing(config: DataConfig, settings: str | None = None) -> None:
    """Raise `DataError` if what training reads is not there; `settings` are those that prepare_data.py needs for it."""
    if config.source is Source.random:
        return
    if config.source is Source.tokens:
        for key, path in (("input", config.input), ("valid_input", config.valid_input)):
            if path is not None and not (Path(path).is_file() or any(Path(path).rglob("*.bin"))):
                raise DataError(f"data.{key} ({path}) is no folder with .bin files, nor one of them")
        if config.tokenizer is not None:
            refuse_no_tokenizer(config.tokenizer, "data.tokenizer")
    elif not (Path(config.path) / "corpus.json").exists():
        settings = settings or "with the same data settings"
        if config.source is Source.local and config.input is None and not config.sources:
            settings += " data.input=..."
        command = f"python prepare_data.py {settings}"
        raise DataError(f"there is no prepared data in {config.path}; run: {command}")


def refuse_no_tokenizer(name: str | Path, key: str = "tokenizer.model") -> None:
    """Raise `DataError` if a tokenizer's name can only be that of a file or folder and it holds none."""
    path = Path(name)
    if path.is_dir():
        if not any((path / file).exists() for file in TOKENIZER_FILES):
            raise DataError(f"{path} holds no tokenizer: neither {' nor '.join(TOKENIZER_FILES)} is there")
    elif not path.is_file() and (path.suffix in (".model", ".json") or len(path.parts) > 2):
        raise DataError(
            f"{key} ({name}) does not exist; name a .model, a tokenizer.json, a folder that holds one, or a "
            "Hugging Face name"
        )


CORPUS_KEYS = {f.name for f in fields(CorpusConfig)}
TRAINING_ONLY = {f.name for f in fields(DataConfig)} - CORPUS_KEYS


@dataclass(kw_only=True, slots=True)
class RampConfig:
    """Batch-size ramp-up: `start_tokens`, then `increment_tokens` more every `every_steps` steps."""

    start_tokens: int | None = None  # null: no ramp
    increment_tokens: int = 0
    every_steps: int = 0


def packs_of_step(step: int, *, global_batch_tokens: int, ramp: RampConfig, pack_tokens: int) -> int:
    """Count the packs in the batch of `step` (the first is 0), the ramp-up included."""
    tokens = global_batch_tokens
    if ramp.start_tokens is not None:
        tokens = min(tokens, ramp.start_tokens + ramp.increment_tokens * (step // ramp.every_steps))
    return tokens // pack_tokens
