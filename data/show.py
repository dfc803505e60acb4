"""What a step trains on: python -m data.show run=runs/demo step=1234

Prints the documents of the step, decoded. What stands in ⟦ ⟧ is read and not learnt: the first token of a
document, prompts, padding. `samples=n` shows the first n packs only; `first_sample=` is needed for a run that
files were added to, and is in the state of its checkpoints.
"""

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.batches import IGNORED
from data.config import DataConfig, DataError, RampConfig, packs_of_step
from data.corpus import Corpus, open_corpus
from data.tokenizer import Tokenizer

KEYS = ("run", "step", "samples", "first_sample")


def show(run: Path, step: int, *, samples: int | None = None, first_sample: int = 0) -> None:
    """Print the packs of a step of a run, the first step being 0."""
    config, packs_of = _run_config(run)
    corpus = open_corpus(config["data"], vocab_size=config["vocab_size"])
    corpus.train.begin_at(first_sample)
    first = sum(packs_of(before) for before in range(step))
    count = packs_of(step)
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
    unknown = [key for key in given if key not in KEYS]
    if unknown or "run" not in given or not all(given[key].isdigit() for key in KEYS[1:] if key in given):
        raise DataError(
            f"usage: python -m data.show run=runs/demo step=1234; keys are {', '.join(KEYS)}, not {unknown}"
        )
    samples = int(given["samples"]) if "samples" in given else None
    step, first_sample = int(given.get("step", 0)), int(given.get("first_sample", 0))
    show(Path(given["run"]), step, samples=samples, first_sample=first_sample)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
