"""Turn text into a corpus of tokens: python prepare_data.py data=pile_small; see README.md."""

import sys
import time
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from conf.cli import checked, data_settings, report_user_errors, run
from conf.schema import PrepareConfig
from corpus.config import Source

SAMPLE_TOKENS = 120


@hydra.main(version_base="1.3", config_path="conf", config_name="prepare_data")
def main(cfg: DictConfig) -> None:
    with report_user_errors():
        try:
            work(checked(cfg), data_settings(HydraConfig.get(), "data.name", "data.path"))
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            raise


def work(config: PrepareConfig, settings: str = "with the data settings of this command") -> None:
    """Prepare a corpus, or the part of it that this process does, and show what became of it.

    `settings` are those by which train.py finds it.
    """
    from corpus.prepare import existing, sample_texts
    from data.manifest import read_manifest

    path = Path(config.data.path)
    if existing(config.data, config.tokenizer, add=config.add):
        print(f"{path} was prepared before with the same settings; it is used as it is")
    elif not write(config):
        print(f"part {config.shard} of {config.shards} is done; {path} is there when all are")
        return
    about = read_manifest(path)
    report(about["left_out"])
    print_table(about)
    for source, text in sample_texts(config.data, 3, max_tokens=SAMPLE_TOKENS):
        print(f"\n--- a document of {source}, decoded again\n{text.rstrip()}")
    model = "" if config.data.source is Source.builtin else "model=125m "  # for 4,096 pieces the smallest will do
    print(f"\nnext: python train.py {model}{settings}")


def write(config: PrepareConfig) -> bool:
    """Prepare the corpus, with a progress bar; say whether all of it is done."""
    import os

    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from corpus.prepare import Counts, prepare

    workers = config.workers or len(os.sched_getaffinity(0))
    start, before = 0.0, 0
    # The delay keeps the bar away until there is something to count.
    with (
        logging_redirect_tqdm(),
        tqdm(unit=" documents", mininterval=0.5, delay=1e-3, file=sys.stderr) as bar,
    ):

        def on_progress(counts: Counts) -> None:
            nonlocal start, before
            if not start:
                start, before = time.perf_counter(), counts.text_bytes
            seconds = time.perf_counter() - start
            if seconds > 0.1:
                speed = (counts.text_bytes - before) / 1e6 / seconds
                bar.set_postfix_str(f"{counts.tokens / 1e6:.2f}M tokens, {speed:.2f} MB/s", refresh=False)
            bar.update(counts.documents - bar.n)

        about, left_out = prepare(
            config.data,
            config.tokenizer,
            workers=workers,
            on_progress=on_progress,
            shards=config.shards,
            shard=config.shard,
            add=config.add,
            save_every_s=config.save_every_s,
        )
    if about is None:
        report(left_out.as_json())
    return about is not None


def report(left_out: dict[str, Any]) -> None:
    """Say what was not taken: counts, and the first places."""
    if left_out["empty"]:
        print(f"{left_out['empty']} records without text were left out")
    if left_out["count"]:
        print(f"{left_out['count']} bad records were left out, among them:")
        for place in left_out["places"]:
            print(f"  {place}")


def print_table(about: dict[str, Any]) -> None:
    """Print documents, tokens and bytes a token, by split and source."""
    print(f"\n{'split':6} {'source':24} {'documents':>12} {'tokens':>14} {'bytes/token':>12}")
    for split, sources in about["splits"].items():
        total = {key: sum(s[key] for s in sources.values()) for key in ("documents", "tokens", "text_bytes")}
        for name, counts in [*sources.items(), ("(all)", total)]:
            ratio = counts["text_bytes"] / max(1, counts["tokens"])
            print(f"{split:6} {name:24} {counts['documents']:12,} {counts['tokens']:14,} {ratio:12.2f}")


def spread(arguments: list[str]) -> list[str]:
    """Make of `shards=64` a sweep over its parts, unless one of them or an option of Hydra's is named."""
    shards = [argument.removeprefix("shards=") for argument in arguments if argument.startswith("shards=")]
    if not shards or not shards[-1].isdigit() or any(a.startswith(("shard=", "-")) for a in arguments):
        return []
    return ["--multirun", f"shard=range({shards[-1]})"] if int(shards[-1]) > 1 else []


if __name__ == "__main__":
    sys.argv[1:1] = spread(sys.argv[1:])
    run(main, "prepare_data")
