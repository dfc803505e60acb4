"""`corpus.json`, the manifest of a prepared corpus, and checks of the configuration against it. Torch-free."""

import json
from pathlib import Path
from typing import Any

from corpus.config import DataError, Source, as_paths
from data.config import DataConfig, check_tokenizer, plain_name
from data.local_files import token_paths
from data.packing import find_packing


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "corpus.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        _ = manifest["tokenizer"]["fingerprint"], manifest["splits"]["train"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} does not describe a corpus ({error}); prepare it again") from None
    return manifest


def check_exists(config: DataConfig, settings: str = "with the same data settings") -> None:
    """Raise `DataError` if the training data does not exist; `settings` are the arguments to prepare it with."""
    find_packing(config.packing)
    if config.source is Source.tokens:
        for key, paths in (("input", config.input), ("valid_input", config.valid_input)):
            for path in as_paths(paths):
                if not token_paths(path):
                    raise DataError(f"data.{key} ({path}) is neither a .bin file nor a folder with one")
        if config.tokenizer is not None:
            check_tokenizer(config.tokenizer, "data.tokenizer")
    elif config.source is not Source.random and not (Path(config.path) / "corpus.json").exists():
        if config.source is Source.local and config.input is None and not config.sources:
            settings += " data.input=..."
        raise DataError(f"there is no prepared data in {config.path}; run: python prepare_data.py {settings}")


def check_fits(config: DataConfig, vocab_size: int) -> None:
    """Raise `DataError` if a prepared corpus does not match `data.mix` or the vocabulary size."""
    if config.source not in (Source.tokens, Source.random) and (Path(config.path) / "corpus.json").exists():
        manifest = read_manifest(Path(config.path))
        check_vocab_size(f"{config.path}/tokenizer", manifest["tokenizer"]["vocab_size"], vocab_size)
        mix_weights(config, set(manifest["splits"]["train"]))


def check_vocab_size(tokenizer: str, n_pieces: int, vocab_size: int) -> None:
    if n_pieces > vocab_size:
        enough = f"pass model.vocab_size={-(-n_pieces // 128) * 128}"
        raise DataError(f"{tokenizer} has {n_pieces} pieces, more than model.vocab_size ({vocab_size}); {enough}")


def mix_weights(config: DataConfig, sources: set[str]) -> dict[str, float]:
    """Return `data.mix` by source, which may be given by its `plain_name`."""
    weights = {}
    for name, weight in config.mix.items():
        matching = [name] if name in sources else [source for source in sources if name == plain_name(source)]
        if len(matching) != 1:
            what = "there are several such sources" if matching else "there is no such source"
            raise DataError(f"data.mix.{name}: {what}; choose from {', '.join(sorted(sources))}")
        weights[matching[0]] = weight
    return weights
