"""What a step trains on: python -m data.show run=runs/demo step=1234

Prints the documents of the step, decoded; steps are numbered as the log has them, from 1. What stands in ⟦ ⟧ is read
and not learnt: the first token of a document, prompts, padding. `samples=n` shows the first n packs only.
"""

import json
import os
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from corpus.config import DataError
from data.batches import IGNORED
from data.config import DataConfig, RampConfig, packs_of_step
from data.dataset import Corpus, open_corpus
from data.tokenizer import Tokenizer

KEYS = ("run", "step", "samples")
USAGE = "python -m data.show run=runs/demo step=1234"


def show(run: Path, step: int, *, samples: int | None = None) -> None:
    """Print the packs of a step of a run, the first step being 1; raises `DataError` if they are not known any more."""
    config, packs_of = _run_config(run)
    if (last := _last_step(run)) < step:
        print(f"{run} has not been at step {step} yet: it has come to step {last}")
    corpus = open_corpus(config["data"], vocab_size=config["vocab_size"])
    first, count = sum(packs_of(before) for before in range(step - 1)), packs_of(step - 1)
    corpus.train.begin_at(_first_sample(run, corpus, step, first))
    print(f"step {step} of {run}: samples {first} to {first + count - 1}, each {config['data'].pack_tokens} tokens")
    shown = np.arange(first, first + (count if samples is None else min(count, samples)))
    for sample, pack in zip(shown.tolist(), corpus.train.locate(shown).tolist(), strict=True):
        show_pack(corpus, sample, pack)


def show_pack(corpus: Corpus, sample: int, pack: int) -> None:
    """Print the documents of a pack, from the very batch that is trained on."""
    batch = corpus.train.batch(np.array([pack]))
    tokens, labels = batch.tokens_BT[0].numpy(), batch.labels_BT[0].numpy()
    learnt = np.concatenate([[False], labels[:-1] != IGNORED])
    pieces = corpus.train.pieces(pack)
    source = corpus.sources[corpus.train.source_of(pack)]
    targets = int((labels != IGNORED).sum())
    print(f"\n=== sample {sample}: pack {pack} of {source}, {len(pieces)} documents, {targets} targets")
    at = 0
    for piece in pieces:
        whole = "" if piece.ends else ", goes on elsewhere"
        print(f"--- {piece.file.stem}.bin from token {piece.start}, {piece.length} tokens{whole}")
        here = slice(at, at + piece.length)
        print(marked(corpus.tokenizer, tokens[here], learnt[here]))
        at += piece.length
    if at < len(tokens):
        print(f"--- {len(tokens) - at} {'tokens of padding' if pieces else 'random tokens'}")


def marked(tokenizer: Tokenizer | None, tokens: np.ndarray, learnt: np.ndarray) -> str:
    """Decode tokens, with brackets around those that are not learnt."""
    limits = [0, *(np.flatnonzero(np.diff(learnt)) + 1).tolist(), len(tokens)]
    parts = []
    for start, end in pairwise(limits):
        ids = tokens[start:end].tolist()
        text = " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
        parts.append(text if start < end and learnt[start] else f"⟦{text}⟧")
    return "".join(parts)


def _last_step(run: Path) -> int:
    """Give the last step that a run has written down; a line may have been cut short."""
    path = run / "metrics.jsonl"
    for line in reversed(path.read_text().splitlines() if path.exists() else []):
        with suppress(ValueError):
            return json.loads(line)["step"]
    return 0


def _first_sample(run: Path, corpus: Corpus, step: int, sample: int) -> int:
    """Give where the order of the data begins, which is not at 0 if files were added to it."""
    stored = sorted(run.glob(f"checkpoints/step-{'[0-9]' * 8}/state.json"))[-1:]
    if not stored:
        return 0
    state = json.loads(stored[0].read_text())
    if state["data"]["parts"] != corpus.fingerprints:
        raise DataError(
            f"the data or the tokenizer changed after {stored[0].parent} was saved, so what step {step} trained on is "
            "not known; go on with the run first, or bring back what was there"
        )
    first = state["progress"]["first_sample"]
    if sample < first:
        raise DataError(
            f"step {step} was before files were added to the data of {run}, so what it trained on is not known"
        )
    return first


def _run_config(run: Path) -> tuple[dict[str, Any], Any]:
    path = run / "config.yaml"
    if not path.exists():
        raise DataError(f"run ({run}) holds no config.yaml; name a run folder, such as run=runs/demo")
    stored: Any = OmegaConf.load(path)
    try:
        data: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), stored.data))
        ramp: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RampConfig), stored.ramp))
    except OmegaConfBaseException as error:
        raise DataError(f"{path} is not the configuration of a run of this version: {error}") from None
    batch = stored.global_batch_tokens

    def packs_of(step: int) -> int:
        return packs_of_step(step, global_batch_tokens=batch, ramp=ramp, pack_tokens=data.pack_tokens)

    return {"data": data, "vocab_size": stored.model.vocab_size}, packs_of


def main(arguments: list[str]) -> None:
    given = {key: value for key, _, value in (argument.partition("=") for argument in arguments)}
    for key in given:
        if key not in KEYS:
            raise DataError(f"{key} is not a setting; there are {', '.join(KEYS)}: {USAGE}")
    if "run" not in given:
        raise DataError(f"run is not set; name a run folder: {USAGE}")
    for key in KEYS[1:]:
        if key in given and not (given[key].isdecimal() and int(given[key])):
            raise DataError(f"{key} ({given[key]}) must be a whole number from 1 on: {USAGE}")
    samples = int(given["samples"]) if "samples" in given else None
    show(Path(given["run"]), int(given.get("step", 1)), samples=samples)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; Python would say so once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
