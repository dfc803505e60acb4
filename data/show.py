"""Print the training data of a step: python -m data.show runs/demo --step 1234

Prints the decoded documents of each pack; steps are counted from 1, as in the log. Text in ⟦ ⟧ is no target: the
first token of a document, prompts, padding.
"""

import argparse
import json
import sys
from itertools import groupby, pairwise
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf.errors import OmegaConfBaseException

from conf.schema import stored
from corpus.config import DataError
from data.batches import IGNORED
from data.config import DataConfig, RampConfig, packs_of_step, parse_ranges
from data.dataset import Corpus, open_corpus
from data.tokenizer import Tokenizer
from tracking.logs import escape_unprintable, printable, quiet_pipe
from tracking.metrics_file import last_step, read_records
from tracking.run_folder import write_atomically

NOTES = "batches.jsonl"  # in a run folder


def note_batches(run: Path, run_config: dict[str, Any], corpus: Corpus, *, step: int, **samples: int) -> None:
    """Record everything that determines the batches after `step`, replacing notes of later steps."""
    note = {key: run_config[key] for key in ("global_batch_tokens", "ramp", "skip_batches", "data")}
    note |= {"vocab_size": run_config["model"]["vocab_size"], "fingerprint": corpus.fingerprint}
    notes = [note for note in read_records(run / NOTES) if note["step"] < step] + [{"step": step, **samples, **note}]
    write_atomically(run / NOTES, "".join(json.dumps(note) + "\n" for note in notes))


def show(run: Path, step: int, *, samples: int | None = None) -> None:
    """Print the packs of a step, counted from 1; raise `DataError` if they are not known."""
    notes = [note for note in read_records(run / NOTES) if note["step"] < step]
    if not notes:
        raise DataError(f"{run} has no record of step {step} in {NOTES}; name a run folder and one of its steps")
    note = notes[-1]
    data, ramp = stored(DataConfig, note["data"]), stored(RampConfig, note["ramp"])
    of_run = {"global_batch_tokens": note["global_batch_tokens"], "ramp": ramp, "pack_tokens": data.pack_tokens}
    *before, count = (packs_of_step(k, **of_run) for k in range(note["step"], step))
    first = note["samples"] + sum(before)
    if (last := last_step(run)) < step:
        print(f"{run} has not reached step {step}: it is at step {last}")
    if any(step in steps for steps in parse_ranges(note["skip_batches"])):
        print(f"step {step} was not trained on: it is in skip_batches")
    corpus = open_corpus(data, vocab_size=note["vocab_size"])
    if corpus.fingerprint != note["fingerprint"]:
        raise DataError(f"the data or the tokenizer has changed since step {step} of {run}")
    corpus.train.begin_at(note["first_sample"])
    print(f"step {step} of {run}: samples {first} to {first + count - 1}, each {data.pack_tokens} tokens")
    shown = np.arange(first, first + min(count, samples or count))
    for sample, pack in zip(shown.tolist(), corpus.train.locate(shown).tolist(), strict=True):
        show_pack(corpus, sample, pack)


def show_pack(corpus: Corpus, sample: int, pack: int) -> None:
    packs = np.array([pack])
    batch, pieces = corpus.train.batch(packs), corpus.train.pieces(packs)
    tokens, labels = batch.tokens_BT[0].numpy(), batch.labels_BT[0].numpy()
    is_target = np.concatenate([[False], labels[:-1] != IGNORED])
    source, targets = corpus.sources[int(corpus.train.source_of(packs)[0])], int((labels != IGNORED).sum())
    print(f"\n=== sample {sample}: pack {pack} of {source}, documents: {len(pieces.starts)}, targets: {targets}")
    at = 0
    for file, start, length, ends in zip(pieces.files, pieces.starts, pieces.lengths, pieces.ends, strict=True):
        more = "" if ends else ", continued elsewhere"
        print(f"--- {corpus.train.files[file].stem}.bin from token {start}, {length} tokens{more}")
        print(printable(marked(corpus.tokenizer, tokens[at : at + length], is_target[at : at + length])))
        at += length
    if at < len(tokens):
        print(f"--- {len(tokens) - at} tokens of padding")


def marked(tokenizer: Tokenizer | None, tokens: np.ndarray, is_target: np.ndarray) -> str:
    """Decode a document's tokens, with brackets around non-targets."""
    ids = tokens.tolist()
    limits = [0, *(np.flatnonzero(np.diff(is_target)) + 1).tolist(), len(ids)]
    if tokenizer is None:
        parts = [" ".join(map(str, ids[a:b])) for a, b in pairwise(limits)]
    else:
        # decode everything at once: a character may span several tokens
        text = decoded(tokenizer, ids)
        places = [len(commonprefix([text, decoded(tokenizer, ids[:limit])])) for limit in limits[:-1]]  # noqa: RUF071
        parts = [text[a:b] for a, b in pairwise([*places, len(text)])]
    return "".join(part if is_target[at] else f"⟦{part}⟧" for at, part in zip(limits, parts, strict=False))


def decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Decode ids, special tokens included."""
    names = {token: name for name, token in tokenizer.special_ids.items()}
    runs = ((name, list(run)) for name, run in groupby(ids, names.get))
    return "".join(tokenizer.decode(run) if name is None else name * len(run) for name, run in runs)


@quiet_pipe()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("data.show", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder, such as runs/demo")
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--samples", type=int, help="number of packs to print")
    given = parser.parse_args(arguments)
    escape_unprintable()
    try:
        show(given.run, given.step, samples=given.samples)
    except (DataError, OmegaConfBaseException) as error:  # or a setting of another version
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
