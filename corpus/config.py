"""Configuration of corpora and tokenizers. Torch-free."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.config import UserError, unless


class DataError(UserError):
    """Text, tokens or a tokenizer that cannot be used; the message is for the user."""


def cause_of(error: BaseException) -> str:
    """Return the first line of the root cause of another library's error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class Source(Enum):
    builtin = "builtin"  # the Python standard library's sources and documentation
    local = "local"  # files on this machine
    huggingface = "huggingface"  # datasets.load_dataset
    tokens = "tokens"  # token files of another program; nothing to prepare
    random = "random"  # random tokens, generated on the fly; nothing to prepare


class Style(Enum):
    text = "text"  # a record is a text
    alpaca = "alpaca"  # a record is an instruction, an optional input, and an output
    chat = "chat"  # a record is a list of messages


class OnBadRecord(Enum):
    error = "error"
    skip = "skip"


class SplitBy(Enum):
    hash = "hash"  # of a document's text, so that added documents do not change the split of others
    train_test_split = "train_test_split"  # as in InternLM's tutorial


MOST_SHARDS = 1000  # jobs per corpus
STRUCTURED = (".json", ".jsonl", ".parquet")  # suffixes of files of records


def as_paths(value: Any) -> list[str]:
    """Return an input (null, a path or a list of paths) as a list."""
    return [str(path) for path in (value if isinstance(value, list) else [value]) if path is not None]


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """Location and format of text; each of `data.sources` may override it."""

    input: Any = None  # local: a file, folder, glob or fsspec URL, or a list of them; tokens: a folder
    valid_input: Any = None  # local, tokens: validation data, instead of valid_fraction
    text_key: str = "text"  # dotted key of a record's text
    messages_key: str = "messages"  # chat: dotted key of a record's messages
    source_key: str | None = None  # dotted key of a record's source (null: one source per sub-folder)
    text_suffixes: list[str] = field(default_factory=".txt .md .rst .html .htm .py".split)  # of files that are text
    text_lines: bool = False  # every non-blank line of such a file is a document, as in InternLM


@dataclass(kw_only=True, slots=True)
class CorpusConfig(SourceConfig):
    """A corpus, up to its tokens."""

    name: str = MISSING
    path: str = MISSING  # the folder prepare_data.py writes and train.py reads
    source: Source = MISSING
    sources: dict[str, Any] = field(default_factory=dict)  # local: name -> input, or {input, text_key, ...}
    dataset: str | None = None  # huggingface: name of a dataset on the hub, or a folder
    dataset_config: str | None = None
    dataset_split: str = "train"
    dataset_valid_split: str | None = None  # huggingface: the validation split, instead of valid_fraction
    streaming: bool = False  # huggingface: do not store the dataset
    style: Style = Style.text
    chat_template: str = "internlm"  # alpaca, chat: internlm, chatml, or a file with a Jinja template
    valid_fraction: float = 0.01
    split_by: SplitBy = SplitBy.hash
    valid_seed: int = 42
    max_documents: int | None = None
    max_document_mb: int = 256  # documents are held in memory; a larger one is a bad record
    on_bad_record: OnBadRecord = OnBadRecord.error
    vocab_size: int = 32768  # of a tokenizer trained on this corpus, or of random tokens

    def source_configs(self) -> dict[str, SourceConfig]:
        """Return the configuration of each of `sources`, with defaults from `data`; raises OmegaConf's errors."""
        shared = {f.name: getattr(self, f.name) for f in fields(SourceConfig)} | {"input": MISSING, "valid_input": None}
        given = {name: value if isinstance(value, dict) else {"input": value} for name, value in self.sources.items()}
        schema = {name: OmegaConf.structured(SourceConfig(**shared)) for name in given}
        merged: Any = OmegaConf.merge({"data": {"sources": schema}}, {"data": {"sources": given}})
        return OmegaConf.to_object(merged)["data"]["sources"]  # type: ignore[call-overload,index]

    def source_problems(self) -> Iterator[str]:
        """Yield settings that are missing for preparation; training does not need them."""
        if self.source is Source.local and self.input is None and not self.sources:
            yield "data.input is not set; name a file, a folder or a glob, such as data.input='texts/*.jsonl.gz'"
        if self.input is not None and self.sources:
            yield f"data.input ({self.input}) and data.sources: set one of them"
        if self.source is Source.huggingface and self.dataset is None:
            yield "data.dataset is not set; name a dataset, such as data.dataset=ola13/small-the_pile"

    def problems(self) -> Iterator[str]:
        if self.valid_input is not None and self.source not in (Source.local, Source.tokens):
            yield f"data.valid_input ({self.valid_input}) needs data.source local or tokens, not {self.source.value}"
        if self.split_by is SplitBy.train_test_split and (self.source is not Source.huggingface or self.streaming):
            yield "data.split_by (train_test_split) needs a dataset that is not streamed; use data.split_by=hash"
        if self.dataset_valid_split is not None and self.split_by is SplitBy.train_test_split:
            yield "data.dataset_valid_split and data.split_by (train_test_split): set one of them"
        if not 0 <= self.valid_fraction < 1:
            yield f"data.valid_fraction ({self.valid_fraction}) must be in [0, 1)"
        counts = ("max_document_mb", "vocab_size", "max_documents")
        yield from unless(self, "data", "at least 1", lambda x: x >= 1, *counts)
        try:
            self.source_configs()
        except OmegaConfBaseException as error:
            yield f"{error.full_key}: {cause_of(error)}"


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    model: str | None = None  # a SentencePiece .model, a tokenizer.json, a folder, or a Hugging Face name
    vocab_size: int = MISSING  # of the tokenizer to train if there is no model
    add_special_tokens: list[str] = field(default_factory=list)  # added to the vocabulary if missing
    special_tokens_in_text: bool = False  # encode special tokens' names in documents as the tokens; false: as text
    add_bos: bool = False
    add_eos: bool = True
    train_bytes: int = 64_000_000  # of text to train the tokenizer on, from the start of each file

    def problems(self) -> Iterator[str]:
        # 256 bytes, unknown, bos, eos and room for merges
        if self.model is None and self.vocab_size < 300:
            yield f"tokenizer.vocab_size ({self.vocab_size}) must be at least 300: 256 bytes, controls and pieces"
        yield from unless(self, "tokenizer", "at least 1", lambda x: x >= 1, "train_bytes")
