"""Prepare a corpus of tokens from text: python prepare_data.py data=pile_small; see README.md."""

import signal
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # no traceback on Ctrl-C during imports
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from hydra.core.hydra_config import HydraConfig

from conf.cli import data_settings, run
from conf.schema import PrepareConfig
from tracking.logs import printable, without_secrets

SAMPLE_TOKENS = 120


def main(config: PrepareConfig) -> None:
    try:
        work(config, data_settings(HydraConfig.get()))
    except KeyboardInterrupt:
        print("interrupted; run the same command to continue", file=sys.stderr)
        raise


def work(config: PrepareConfig, settings: str = "with the data settings of this command") -> None:
    """Prepare a corpus, or this job's shard of it, and print a summary; `settings` are train.py's arguments for it."""
    from corpus.prepare import is_prepared
    from data.manifest import read_manifest
    from data.shards import Shard

    path = Path(config.data.path)
    if is_prepared(config):
        print(f"{path} was prepared before with the same settings")
        about = read_manifest(path)
    elif (about := write(config)) is None:
        print(f"shard {config.shard} of {config.shards} is done; the last shard writes {path}")
        return
    if config.verify:
        stems = [stem for split in about["splits"].values() for counts in split.values() for stem in counts["shards"]]
        for stem in stems:
            Shard(path / stem, verify=True)
        print(f"shards verified: {len(stems)}")
    print_left_out(about["left_out"])
    print_table(about)
    print_samples(path, about["splits"]["train"])
    print(f"\nnext: python train.py {without_secrets(settings)}")


def write(config: PrepareConfig) -> dict[str, Any] | None:
    """Prepare the corpus with a progress bar; return the contents of corpus.json, or None if it is incomplete."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from corpus.prepare import prepare

    documents = tokens = text_bytes = 0
    options: Any = {"total": 1.0, "bar_format": "{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}"}
    with logging_redirect_tqdm(), tqdm(**options, mininterval=0.5, file=sys.stderr) as bar:

        def progress(more_documents: int, more_tokens: int, more_text_bytes: int, share: float) -> None:
            nonlocal documents, tokens, text_bytes
            documents, tokens = documents + more_documents, tokens + more_tokens
            text_bytes += more_text_bytes
            speed = text_bytes / 1e6 / max(0.1, bar.format_dict["elapsed"])
            bar.set_postfix_str(f"documents {documents:,}, tokens {tokens / 1e6:.2f}M, {speed:.2f} MB/s", refresh=False)
            bar.update(share)

        return prepare(config, progress)


def print_left_out(left_out: dict[str, Any]) -> None:
    kinds = {"duplicates": "exact duplicates of documents", "empty": "records without text", "count": "bad records"}
    for key, kind in kinds.items():
        if left_out[key]:
            print(f"{kind} left out: {left_out[key]:,}{', the first at' * (key == 'count')}")
    for place in left_out["places"]:
        print(f"  {place}")


def print_table(about: dict[str, Any]) -> None:
    """Print documents, tokens and bytes per token by split and source."""
    print(f"\n{'split':6} {'source':24} {'documents':>12} {'tokens':>14} {'bytes/token':>12}")
    for split, sources in about["splits"].items():
        total = {key: sum(s[key] for s in sources.values()) for key in ("documents", "tokens", "text_bytes")}
        for name, counts in [*sources.items(), ("(all)", total)]:
            ratio = counts["text_bytes"] / max(1, counts["tokens"])
            print(f"{split:6} {name:24} {counts['documents']:12,} {counts['tokens']:14,} {ratio:12.2f}")
    if without := sorted(set(about["splits"]["train"]) - set(about["splits"]["valid"])):
        print(f"no validation documents of {', '.join(without)}")


def print_samples(folder: Path, sources: dict[str, Any]) -> None:
    """Print the decoded start of a document of the first three sources."""
    from data.shards import LOSS_MASKED, Shard
    from data.tokenizer import INCOMPLETE, load_tokenizer

    tokenizer = load_tokenizer(folder / "tokenizer")
    for source, counts in list(sources.items())[:3]:
        shard = Shard(folder / counts["shards"][0])
        ids = [token & (LOSS_MASKED - 1) for token in shard.document(shard.n_documents // 2).tolist()]
        text = tokenizer.decode(ids[:SAMPLE_TOKENS])
        text = text if len(ids) <= SAMPLE_TOKENS else text.rstrip(INCOMPLETE) + " ..."
        print(f"\n--- a document of {source}, decoded\n{printable(text.rstrip())}")


def spread(arguments: list[str]) -> list[str]:
    """Return arguments that turn `shards=64` into a multirun over shards, unless `shard` or a Hydra option is given."""
    shards = [argument.removeprefix("shards=") for argument in arguments if argument.startswith("shards=")]
    if not shards or not shards[-1].isdigit() or any(a.startswith(("shard=", "-")) for a in arguments):
        return []
    return ["--multirun", f"shard=range({shards[-1]})"] if int(shards[-1]) > 1 else []


if __name__ == "__main__":
    sys.argv[1:1] = spread(sys.argv[1:])
    run(main, "prepare_data")
