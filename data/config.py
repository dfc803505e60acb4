"""What to train on: where text comes from, how it becomes tokens, how tokens become batches.

One `data` group serves `prepare_data.py` (the first half of the fields) and `train.py` (the second).
Free of torch, so that a wrong value is refused before torch is imported.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from omegaconf import MISSING

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
# What training reads of a DataConfig and preparing does not
TRAINING_ONLY = {"seq_len", "pack_len", "packing", "mix", "micro_batch_size", "seed", "workers", "tokenizer"}
MOST_SHARDS = 1000  # parts that one corpus may be prepared in


class DataError(Exception):
    """Text, tokens or a tokenizer that cannot be used, told as a sentence for the user."""


def cause_of(error: BaseException) -> str:
    """Give the first line of what an error of another library came of."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class Source(Enum):
    builtin = "builtin"  # the Python standard library's sources and documentation
    local = "local"  # files on this machine
    huggingface = "huggingface"  # datasets.load_dataset
    tokens = "tokens"  # tokens that another program wrote; nothing to prepare
    random = "random"  # random tokens, made when asked for; nothing to prepare


class Packing(Enum):
    concat = "concat"  # documents end to end as they lie, cut every pack_len tokens, isolated
    best_fit = "best_fit"  # documents placed whole where they fit best; only longer ones are cut; isolated
    internlm = "internlm"  # InternLM's default: documents shuffled, end to end, isolated
    internlm_one = "internlm_one"  # the same, in samples of seq_len tokens whose documents see each other


class Style(Enum):
    text = "text"  # a record is a text
    alpaca = "alpaca"  # a record is an instruction, perhaps an input, and an output
    chat = "chat"  # a record is a list of messages


class OnBadRecord(Enum):
    error = "error"
    skip = "skip"


class HeldOutBy(Enum):
    content = "content"  # a hash of the text decides, so that a document stays where it is when others are added
    rows = "rows"  # as InternLM's tutorial: datasets' train_test_split, which another number of rows shuffles anew


@dataclass(kw_only=True, slots=True)
class DataConfig:
    name: str = MISSING
    path: str = MISSING  # the folder prepare_data.py writes and train.py reads

    # where the text comes from
    source: Source = MISSING
    input: str | None = None  # local: a file, a folder, a glob, or an address that fsspec knows; tokens: a folder
    valid_input: str | None = None  # local, tokens: held out whole, instead of valid_fraction
    sources: dict[str, str] = field(default_factory=dict)  # local: name -> input, instead of input
    dataset: str | None = None  # huggingface: name of a dataset on the hub, or a folder
    dataset_config: str | None = None
    dataset_split: str = "train"
    streaming: bool = False  # huggingface: read it as it arrives, without keeping it
    style: Style = Style.text
    text_key: str = "text"  # dotted key of a record's text
    messages_key: str = "messages"  # chat: dotted key of a record's messages
    chat_template: str = "internlm"  # alpaca, chat: internlm, chatml, or a file with a Jinja template
    source_key: str | None = None  # dotted key of a record's source (null: one source per sub-folder)
    text_lines: bool = False  # .txt: every non-blank line is a document, as InternLM reads it
    raw_json: bool = False  # encode the whole record, JSON syntax included, as InternLM did
    valid_fraction: float = 0.01
    valid_by: HeldOutBy = HeldOutBy.content
    valid_seed: int = 42
    max_documents: int | None = None
    # of a record, its long strings not counted, or of a conversation: that is in memory at once
    max_record_mb: int = 32
    on_bad_record: OnBadRecord = OnBadRecord.error
    vocab_size: int = 32768  # of a tokenizer trained for this corpus; the range of random tokens

    # how batches are made
    seq_len: int = MISSING  # longest attention span, in tokens
    pack_len: int | None = None  # tokens of a pack, a multiple of seq_len (null: seq_len)
    packing: Packing = Packing.concat
    mix: dict[str, float] = field(default_factory=dict)  # source -> weight in training (empty: by size)
    micro_batch_size: int = MISSING  # sequences of seq_len tokens in one forward pass
    seed: int = 1024  # order of documents and packs
    tokenizer: str | None = None  # tokens: what they were made with, for bits per byte and for reading them
    workers: int = 2  # loader processes; the order of batches does not depend on it

    @property
    def pack_tokens(self) -> int:
        return self.pack_len or self.seq_len

    @property
    def packs_per_micro_batch(self) -> int:
        return self.micro_batch_size * self.seq_len // self.pack_tokens

    def source_problems(self) -> Iterator[str]:
        """What is missing to prepare this corpus; training reads what was prepared."""
        if self.source is Source.local and self.input is None and not self.sources:
            yield "data.input is not set; name a file, a folder or a glob, such as data.input='texts/*.jsonl.gz'"
        if self.input is not None and self.sources:
            yield f"data.input ({self.input}) and data.sources: set one of them"
        if self.source is Source.huggingface and self.dataset is None:
            yield "data.dataset is not set; name a dataset, such as data.dataset=ola13/small-the_pile"

    def problems(self) -> Iterator[str]:
        if self.source is Source.tokens and self.input is None:
            yield "data.input is not set; name the folder of .bin files that data.source=tokens reads"
        if self.valid_input is not None and self.source not in (Source.local, Source.tokens):
            yield f"data.valid_input ({self.valid_input}) needs data.source local or tokens, not {self.source.value}"
        if self.valid_by is HeldOutBy.rows and (self.source is not Source.huggingface or self.streaming):
            other = "data.streaming (true)" if self.streaming else f"data.source ({self.source.value})"
            yield f"data.valid_by (rows) needs a dataset that is there whole, not {other}; pass data.valid_by=content"
        wrong = {name: weight for name, weight in self.mix.items() if not 0 <= weight < float("inf")}
        yield from (f"data.mix.{name} ({weight}) must be 0 or more" for name, weight in wrong.items())
        if self.mix and not wrong and not any(self.mix.values()):
            yield f"data.mix ({self.mix}) must give some source a weight"
        if self.max_record_mb < 1:
            yield f"data.max_record_mb ({self.max_record_mb}) must be at least 1"
        if self.raw_json and self.style is not Style.text:
            yield f"data.raw_json (true) needs data.style text, not {self.style.value}"
        if not 0 <= self.valid_fraction < 1:
            yield f"data.valid_fraction ({self.valid_fraction}) must be in [0, 1)"
        if self.max_documents is not None and self.max_documents < 1:
            yield f"data.max_documents ({self.max_documents}) must be at least 1, or null for all"
        if self.vocab_size < 1:
            yield f"data.vocab_size ({self.vocab_size}) must be at least 1"
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


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    model: str | None = None  # a SentencePiece .model, a tokenizer.json, a folder, or a Hugging Face name
    vocab_size: int = MISSING  # of the tokenizer that is trained when no model is given
    add_bos: bool = False
    add_eos: bool = True
    train_bytes: int = 64_000_000  # of text the tokenizer is trained on, drawn evenly from the corpus

    def problems(self) -> Iterator[str]:
        # 256 bytes, unknown, bos, eos and room for merges
        if self.model is None and self.vocab_size < 300:
            yield f"tokenizer.vocab_size ({self.vocab_size}) must be at least 300: 256 bytes, controls and pieces"
        if self.train_bytes < 1:
            yield f"tokenizer.train_bytes ({self.train_bytes}) must be at least 1"


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
