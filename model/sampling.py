"""Text from a model: one token after another, greedily or drawn."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.kv_cache import KVCache
from model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; the order of the four is that of transformers' processors."""

    repetition_penalty: float = 1.0  # on logits of tokens already there (arXiv:1909.05858, sec. 4.1)
    temperature: float = 1.0  # 0: the most likely token
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # nucleus (arXiv:1904.09751)


def next_logits(logits_V: Tensor, seen: Tensor, sampling: Sampling) -> Tensor:
    """Apply penalty, temperature, top-k and top-p to the logits of one text; left-out tokens are -inf."""
    logits_V = logits_V.float().clone()
    if sampling.repetition_penalty != 1:
        old = logits_V[seen]
        logits_V[seen] = torch.where(old < 0, old * sampling.repetition_penalty, old / sampling.repetition_penalty)
    if sampling.temperature not in (0, 1):
        logits_V /= sampling.temperature
    if 0 < sampling.top_k < len(logits_V):
        logits_V[logits_V < logits_V.topk(sampling.top_k).values[-1]] = -torch.inf
    if sampling.top_p < 1:
        ascending, order = logits_V.sort()
        dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        dropped[-1] = False
        logits_V[order[dropped]] = -torch.inf
    return logits_V


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_ids: set[int],
    seeds: list[int],
    vocab_size: int | None = None,
    use_cache: bool = True,
    on_token: Callable[[int, int], bool] | None = None,
) -> list[list[int]]:
    """Continue each prompt by up to `max_new_tokens`; give the new tokens, a stop token left out.

    Each text is drawn from a generator of its own `seeds` entry, so it does not depend on its
    neighbours. `on_token(row, token)` hears of every token, and ends that text by returning True.
    A text ends too where it has filled the model's `max_seq_len`. With `vocab_size`, the rows of a padded
    vocabulary that stand for no token are never chosen.
    """
    device = next(model.parameters()).device
    texts = [list(prompt) for prompt in prompts]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    limit = model.config.max_seq_len
    open_rows = {row for row, text in enumerate(texts) if len(text) < limit}
    longest = min(limit, max(map(len, texts)) + max_new_tokens)
    cache = KVCache(model.config, len(texts), longest, device, next(model.parameters()).dtype) if use_cache else None
    fresh = texts  # what the model has not read
    for _ in range(max_new_tokens):
        if not open_rows:
            break
        logits_BV = _last_logits(model, texts, fresh, cache, device)
        fresh = [[text[-1]] for text in texts]
        for row in sorted(open_rows):
            logits_V = next_logits(logits_BV[row, :vocab_size], torch.tensor(texts[row]).unique(), sampling)
            if sampling.temperature == 0:
                token = int(logits_V.argmax())
            else:
                token = int(torch.multinomial(logits_V.softmax(dim=-1), 1, generator=generators[row]))
            if token in stop_ids:
                open_rows.discard(row)
                continue
            texts[row].append(token)
            fresh[row] = [token]
            if (on_token is not None and on_token(row, token)) or len(texts[row]) >= limit:
                open_rows.discard(row)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def _last_logits(
    model: Transformer,
    texts: list[list[int]],
    fresh: list[list[int]],
    cache: KVCache | None,
    device: torch.device,
) -> Tensor:
    """Give the logits after each text, on the CPU: from its new tokens and the cache, or from all of it."""
    read = texts if cache is None else fresh
    width = max(map(len, read))
    # Padded on the right: causal attention, and the cache's positions, keep the padding unseen.
    tokens_BT = torch.tensor([part + [0] * (width - len(part)) for part in read], device=device)
    first_B1 = torch.tensor([[len(text) - len(part)] for text, part in zip(texts, read, strict=True)], device=device)
    positions_BT = first_B1 + torch.arange(width, device=device)
    last_B = torch.tensor([len(part) - 1 for part in read], device=device)
    rows_B = torch.arange(len(read), device=device)

    def head(h_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        return h_BTD[rows_B, last_B] @ weight_VD.T

    return model(tokens_BT, positions_BT=positions_BT, cache=cache, head=head).float().cpu()
