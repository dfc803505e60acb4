"""Small texts in every format, and corpora made of them."""

import bz2
import dataclasses
import gzip
import io
import json
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as pq
import zstandard

from conf.schema import PrepareConfig
from corpus.config import Source, TokenizerConfig
from corpus.documents import Document, LeftOut
from corpus.inputs import list_items
from corpus.prepare import prepare
from corpus.readers import Reader
from data.config import DataConfig
from data.hf_tokenizer import write_hf_tokenizer
from data.tokenizer import Tokenizer, load_tokenizer, sentencepiece_proto

ROOT = Path(__file__).parent.parent

RECORDS = [
    {"text": f"Document {i}: {'word ' * (i % 7)}\n", "meta": {"set": "Wikipedia (en)" if i % 3 else "C++"}}
    for i in range(60)
]


def local(tmp_path: Path, pattern: str, **changes: object) -> DataConfig:
    config = DataConfig(
        name="mine", path=str(tmp_path / "corpora" / "mine"), source=Source.local, input=str(tmp_path / pattern),
        valid_fraction=0.2, seq_len=8, micro_batch_size=1, workers=0,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def lines(records: list[dict]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def read(config: DataConfig, left_out: LeftOut | None = None) -> list[Document]:
    reader, left_out = Reader(config), left_out or LeftOut(config.on_bad_record)
    return [document for item in list_items(config) for document in reader.documents(item, left_out)]


def texts(config: DataConfig, left_out: LeftOut | None = None) -> list[str]:
    return [document.text for document in read(config, left_out)]


def parquet(records: list[dict]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pyarrow.Table.from_pylist(records), file, row_group_size=7)
    return file.getvalue()


def not_utf8(texts: list[bytes]) -> pyarrow.Array:
    return pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())


PLAIN = {".jsonl": lines, ".json": lambda records: json.dumps(records).encode(), ".parquet": parquet}

PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


def command(data: DataConfig, tokenizer: Tokenizer | TokenizerConfig, **changes: Any) -> PrepareConfig:
    if isinstance(tokenizer, Tokenizer):
        tokenizer = TokenizerConfig(model=str(tokenizer.path), vocab_size=1200)
    return PrepareConfig(**{"data": data, "tokenizer": tokenizer, "workers": 1} | changes)


def made(data: DataConfig, tokenizer: Tokenizer | TokenizerConfig, workers: int = 1, **changes: Any) -> Any:
    progress = changes.pop("progress", lambda *added: None)
    return prepare(command(data, tokenizer, workers=workers, **changes), progress)


def remade(
    tokenizer: Tokenizer, path: Path, pieces: Sequence[str] = (), kind: str = "USER_DEFINED", **rules: bool
) -> Tokenizer:
    """Write a SentencePiece model again, with more pieces and other normalization rules."""
    proto = sentencepiece_proto(tokenizer.path)
    for name, value in rules.items():
        setattr(proto.normalizer_spec, name, value)
    for piece in pieces:
        proto.pieces.add(piece=piece, score=0.0, type=getattr(proto.SentencePiece, kind))
    path.write_bytes(proto.SerializeToString())
    return load_tokenizer(path)


def exported(tokenizer: Tokenizer, folder: Path, *, add_bos: bool = False) -> Tokenizer:
    """Export a tokenizer to a folder and load its tokenizer.json."""
    folder.mkdir(exist_ok=True)
    write_hf_tokenizer(tokenizer, folder, add_bos=add_bos, max_len=64)
    return load_tokenizer(folder / "tokenizer.json")


def n_documents(about: dict[str, Any], split: str = "") -> int:
    return sum(its["documents"] for name, found in about["splits"].items() if split in name for its in found.values())


def contents(folder: str | Path) -> dict[str, bytes]:
    """Return every file of a corpus, of corpus.json only its splits."""
    root = Path(folder)
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    files["corpus.json"] = json.dumps(json.loads(files["corpus.json"])["splits"]).encode()
    return files
