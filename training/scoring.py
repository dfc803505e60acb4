"""Log-likelihoods of continuations, and generation, in any parallel layout."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import lcm
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from data.batches import Batch, collate
from data.best_fit import best_fit
from data.packing import Rows
from data.tokenizer import Tokenizer
from parallel.engine import Engine

T = TypeVar("T")
GoOn = Callable[[Exception | None], bool]
ROW_MULTIPLE = 64  # tokens


class Encoded(NamedTuple):
    """The ids of a text; the first `n_given` are context, the others are predicted."""

    ids: np.ndarray
    n_given: int


class Shape(NamedTuple):
    """Shape of a batch: `rows` of `row_len` tokens, for a model with a context of `context` tokens."""

    rows: int
    row_len: int
    context: int


def encode(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], *, add_bos: bool) -> list[Encoded]:
    """Encode pairs of context and continuation as lm-evaluation-harness does.

    Trailing spaces of a context belong to the continuation, and both are encoded together; a token across the
    boundary counts as continuation. A text without context follows the bos or eos token.
    """
    bos = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
    start = next((token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None), 0)
    contexts = dict.fromkeys(context.rstrip() for context, _ in pairs)
    lengths = dict(zip(contexts, map(len, tokenizer.encode_many(list(contexts))), strict=True))
    found = []
    wholes = tokenizer.encode_many([context + continuation for context, continuation in pairs])
    for (context, _), whole in zip(pairs, wholes, strict=True):
        ids = [*bos, *whole.tolist()]
        n_given = min(len(bos) + lengths[context.rstrip()], len(ids) - 1)
        if not n_given:
            ids, n_given = [start, *ids], 1
        found.append(Encoded(np.array(ids, dtype=np.int32), n_given))
    return found


def windows(text: Encoded, context: int) -> Iterator[Encoded]:
    """Split a text into windows of up to `context` input tokens that predict each token once."""
    for start in range(text.n_given, len(text.ids), context):
        end = min(start + context, len(text.ids))
        first = max(0, end - 1 - context)
        yield Encoded(text.ids[first:end], start - first)


def pack(lengths: Sequence[int], row_len: int) -> list[list[int]]:
    """Pack texts into rows by best fit; return the indices of the texts of each row."""
    offsets = np.cumsum([0, *lengths])
    pieces, firsts = best_fit(offsets, row_len)
    numbers = np.searchsorted(offsets, pieces[:, 0]).tolist()
    return [numbers[start:end] for start, end in pairwise(firsts.tolist())]


def fill(texts: Sequence[Encoded], sources: Sequence[int], rows: Sequence[Sequence[int]], row_len: int) -> Batch:
    """Return a batch of rows of texts, each a segment with the tokens from `n_given` on as targets.

    A row has one more token than `row_len`, which is only a target.
    """
    tokens, source_BT = np.zeros((len(rows), row_len + 1), dtype=np.int32), np.zeros((len(rows), row_len), np.int32)
    is_target = np.zeros(tokens.shape, dtype=bool)
    ends, n_ends, used = list[int](), [0] * len(rows), np.zeros(len(rows), dtype=np.int64)
    for row, numbers in enumerate(rows):
        for number in numbers:
            start, (ids, n_given) = int(used[row]), texts[number]
            end = start + len(ids)
            tokens[row, start:end], source_BT[row, start:end] = ids, sources[number]
            is_target[row, start + n_given : end] = True
            used[row] = min(end, row_len)
            if end <= row_len:
                ends.append(end)
                n_ends[row] += 1
    filled = Rows(tokens, np.array(ends, dtype=np.int64), np.array(n_ends), used, is_target)
    batch = collate(filled, np.zeros(len(rows), dtype=np.int64), seq_len=row_len, isolated=True)
    batch.source_BT = torch.from_numpy(source_BT)
    return batch


def fitting_shape(engine: Engine, texts: Sequence[Encoded], batch_tokens: int) -> Shape:
    """Return the shape of batches of about `batch_tokens`, with rows for the longest text or the model's context."""
    axes, context = engine.mesh.axes, engine.model.config.max_seq_len
    multiple, longest = lcm(ROW_MULTIPLE, axes.cp * axes.tp), max(len(text.ids) for text in texts)
    row_len = -(-min(longest, context) // multiple) * multiple
    return Shape(max(1, batch_tokens // row_len), row_len, context)


def alone(error: Exception | None) -> bool:
    """Go on, or raise this rank's error, whatever the others do."""
    if error is not None:
        raise error
    return True


def in_step(items: Iterator[T], go_on: GoOn) -> Iterator[T]:
    """Yield `items`, of which every rank has the same number; before each and at the end, `go_on` is called.

    It is given the error that this rank's item has raised; it raises on every rank, or ends this by returning False.
    """
    while True:
        item, error = None, None
        try:
            item = next(items, None)
        except Exception as caught:
            error = caught
        if not go_on(error) or item is None:
            return
        yield item


def score(
    engine: Engine, texts: Sequence[Encoded], shape: Shape, go_on: GoOn = alone
) -> tuple[list[float], list[bool]]:
    """Return each text's negative log-likelihood in nats, and whether it is the greedy continuation; a collective.

    `go_on` is as in `in_step`; if it returns False, the rest are skipped.
    """
    longest = min(shape.context, shape.row_len)
    found = [(number, part) for number, text in enumerate(texts) for part in windows(text, longest)]
    sources, parts = [number for number, _ in found], [part for _, part in found]
    rows = pack([len(part.ids) for part in parts], shape.row_len + 1)
    dp_size, first = engine.mesh.dp_size, engine.mesh.dp_rank * shape.rows
    rows += [[]] * (-len(rows) % (shape.rows * dp_size))  # the same number of batches on every rank, of one shape
    starts = range(first, len(rows), shape.rows * dp_size)
    batches = (fill(parts, sources, rows[start : start + shape.rows], shape.row_len) for start in starts)
    totals = engine.evaluate(in_step(batches, go_on), n_sources=len(texts)).tolist()
    return [nll for nll, *_ in totals], [correct == targets for _, correct, targets, _ in totals]


Choose = Callable[[int, list[int], Tensor], int | None]


def extend(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    shape: Shape,
    max_new_tokens: int,
    choose: Choose,
    go_on: GoOn = alone,
) -> list[list[int]]:
    """Continue prompts and return the new tokens, the same on every rank; a collective.

    `choose(number, new, logits_V)` returns the next token of a prompt, or None to end it. There is no KV cache, so
    that every layout works: each token takes a forward pass over all prompts of a batch. `go_on` is as in `in_step`.
    """
    kept = min(shape.context, shape.row_len) - max_new_tokens
    texts = [np.array([*prompt[-kept:], *[0] * max_new_tokens], dtype=np.int32) for prompt in prompts]
    slots, new = [Encoded(text, len(text)) for text in texts], [list[int]() for _ in prompts]
    rows = pack([len(text) for text in texts], shape.row_len)
    rows += [[]] * (-len(rows) % shape.rows)
    logits_NV = torch.empty(0)  # of the last pass

    def passes() -> Iterator[tuple[Batch, list[tuple[int, int]]]]:
        for at in range(0, len(rows), shape.rows):
            here = rows[at : at + shape.rows]
            batch = fill(slots, [0] * len(slots), here, shape.row_len)
            last = dict[int, tuple[int, int]]()  # row and column of each prompt's last token
            for row, numbers in enumerate(here):
                ends = np.cumsum([len(texts[number]) for number in numbers]).tolist()
                last |= {number: (row, end - max_new_tokens - 1) for number, end in zip(numbers, ends, strict=True)}
            for _ in range(max_new_tokens):
                if not last:
                    break
                yield batch, list(last.values())
                for (number, (row, column)), logits_V in zip(list(last.items()), logits_NV, strict=True):
                    token = choose(number, new[number], logits_V)
                    if token is None:
                        del last[number]
                        continue
                    new[number].append(token)
                    batch.tokens_BT[row, column + 1] = token
                    last[number] = row, column + 1

    for batch, places in in_step(passes(), go_on):
        logits_NV = last_logits(engine, batch, places)
    return new


def last_logits(engine: Engine, batch: Batch, places: Sequence[tuple[int, int]]) -> Tensor:
    """Return the logits after the tokens at (row, column), fp32 (N, V) on every rank's CPU; a collective."""
    mesh, n_vocab = engine.mesh, engine.model.config.vocab_size
    logits_NV = torch.zeros(len(places), n_vocab, device=mesh.device)
    rows_N, columns_N = torch.tensor(places, device=mesh.device).unbind(1)

    def head(h_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        here_N = columns_N - mesh.coordinate("cp") * h_BTD.shape[1]  # within this rank's slice of the row
        mine_N = (here_N >= 0) & (here_N < h_BTD.shape[1]) & (mesh.dp_rank == 0)
        first = 0 if engine.vocabulary is None else engine.vocabulary.first
        part_NV = (h_BTD[rows_N[mine_N], here_N[mine_N]] @ weight_VD.T).float()
        logits_NV[mine_N, first : first + len(weight_VD)] = part_NV
        return part_NV

    engine.evaluate([batch], head=head)
    return mesh.sum_(logits_NV).cpu()
