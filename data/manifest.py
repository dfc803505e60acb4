"""`corpus.json`, the manifest of a prepared corpus, and checks of a run against its data. Torch-free."""

import json
from pathlib import Path
from typing import Any

from corpus.config import DataError, Source
from data.config import DataConfig, check_tokenizer
from data.packing import find_packing


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what a prepared corpus holds and how it was made."""
    path = folder / "corpus.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        _ = manifest["tokenizer"]["fingerprint"], manifest["splits"]["train"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} does not describe a corpus ({error}); prepare it again") from None
    return manifest


def check_exists(config: DataConfig, settings: str = "with the same data settings") -> None:
    """Raise `DataError` if what training reads is not there; `settings` are the arguments that prepare it."""
    find_packing(config.packing)
    if config.source is Source.tokens:
        for key, path in (("input", config.input), ("valid_input", config.valid_input)):
            if path is not None and not (Path(path).is_file() or any(Path(path).rglob("*.bin"))):
                raise DataError(f"data.{key} ({path}) is neither a .bin file nor a folder that holds one")
        if config.tokenizer is not None:
            check_tokenizer(config.tokenizer, "data.tokenizer")
    elif config.source is not Source.random and not (Path(config.path) / "corpus.json").exists():
        if config.source is Source.local and config.input is None and not config.sources:
            settings += " data.input=..."
        raise DataError(f"there is no prepared data in {config.path}; run: python prepare_data.py {settings}")


def check_fits(config: DataConfig, vocab_size: int) -> None:
    """Raise `DataError` if a prepared corpus, where there is one, does not go with `data.mix` and the vocabulary."""
    if config.source not in (Source.tokens, Source.random) and (Path(config.path) / "corpus.json").exists():
        manifest = read_manifest(Path(config.path))
        check_vocab_size(f"{config.path}/tokenizer", manifest["tokenizer"]["vocab_size"], vocab_size)
        check_sources(config, set(manifest["splits"]["train"]))


def check_vocab_size(tokenizer: str, n_pieces: int, vocab_size: int) -> None:
    if n_pieces > vocab_size:
        enough = f"pass model.vocab_size={-(-n_pieces // 128) * 128}"
        raise DataError(f"{tokenizer} has {n_pieces} pieces, more than model.vocab_size ({vocab_size}); {enough}")


def check_sources(config: DataConfig, sources: set[str]) -> None:
    if unknown := sorted(set(config.mix) - sources):
        raise DataError(f"data.mix.{unknown[0]}: there is no such source; choose from {', '.join(sorted(sources))}")
