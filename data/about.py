"""What a prepared corpus says of itself, and whether a run goes with it."""

import json
from pathlib import Path
from typing import Any

from corpus.config import DataError
from data.config import DataConfig


def read_about(folder: Path) -> dict[str, Any]:
    """Read what a prepared corpus says of itself."""
    path = folder / "corpus.json"
    try:
        about = json.loads(path.read_text())
        _ = about["tokenizer"]["fingerprint"], about["tokenizer"]["vocab_size"], about["made_by"]
        _ = [source["shards"] for split in about["splits"].values() for source in split.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} does not describe a corpus ({error}); prepare it again") from None
    return about


def refuse_unfit(config: DataConfig, vocab_size: int) -> None:
    """Raise `DataError` if a model lacks rows for a corpus' pieces, or `data.mix` names a source that is not in it.

    A corpus that is not there, which is said elsewhere, is not refused.
    """
    if (Path(config.path) / "corpus.json").exists():
        about = read_about(Path(config.path))
        refuse_small_vocabulary(str(Path(config.path) / "tokenizer"), about["tokenizer"]["vocab_size"], vocab_size)
        refuse_unknown_sources(config, set(about["splits"]["train"]))


def refuse_small_vocabulary(tokenizer: str, n_pieces: int, vocab_size: int) -> None:
    if n_pieces > vocab_size:
        raise DataError(
            f"{tokenizer} has {n_pieces} pieces, more than model.vocab_size ({vocab_size}); pass "
            f"model.vocab_size={-(-n_pieces // 128) * 128}, a multiple of 128 that tensor parallelism divides; the "
            "export leaves out what no token has"
        )


def refuse_unknown_sources(config: DataConfig, sources: set[str]) -> None:
    if unknown := sorted(set(config.mix) - sources):
        raise DataError(f"data.mix.{unknown[0]}: there is no such source; choose from {', '.join(sorted(sources))}")
