"""Autoregressive generation, greedy or sampled."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention import KVCache
from model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters, applied in the order of transformers' logits processors."""

    repetition_penalty: float = 1.0  # arXiv:1909.05858, sec. 4.1
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # nucleus (arXiv:1904.09751)


def next_logits(logits_V: Tensor, seen: Tensor, sampling: Sampling) -> Tensor:
    """Apply penalty, temperature, top-k and top-p to the logits of one text; excluded tokens are -inf."""
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
    on_token: Callable[[int, int], bool] = lambda _row, _token: False,
) -> list[list[int]]:
    """Continue each prompt by up to `max_new_tokens`; return the new tokens without the stop token.

    Each text has a generator seeded by its entry in `seeds`, so the result does not depend on the batch, and
    ends at `model.max_seq_len` at the latest. `on_token(row, token)` is called for each token; if it returns True,
    the text ends. `vocab_size` excludes the padding of a padded vocabulary.
    """
    param = next(model.parameters())
    texts = [list(prompt) for prompt in prompts]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    limit = model.config.max_seq_len
    open_rows = [row for row, text in enumerate(texts) if len(text) < limit]
    longest = min(limit, max(map(len, texts)) + max_new_tokens)
    cache = KVCache(model.config, len(texts), longest, param.device, param.dtype) if use_cache else None
    unread, stopped = texts, False
    for _ in range(max_new_tokens):
        if not open_rows:
            break
        logits_BV = _last_logits(model, texts, texts if cache is None else unread, cache, param.device)
        for row in list(open_rows):
            logits_V = next_logits(logits_BV[row, :vocab_size], torch.tensor(texts[row]).unique(), sampling)
            if sampling.temperature == 0:
                token = int(logits_V.argmax())
            else:
                token = int(torch.multinomial(logits_V.softmax(dim=-1), 1, generator=generators[row]))
            if token not in stop_ids:
                texts[row].append(token)
                stopped = on_token(row, token)
            if token in stop_ids or stopped or len(texts[row]) >= limit:
                open_rows.remove(row)
        unread = [[text[-1]] for text in texts]
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def _last_logits(
    model: Transformer, texts: list[list[int]], unread: list[list[int]], cache: KVCache | None, device: torch.device
) -> Tensor:
    """Return the logits after each text, on the CPU; `unread` are the tokens that are not in the cache."""
    width = max(map(len, unread))
    # Padded on the right, where causal attention and the cache's mask never look.
    tokens_BT = torch.tensor([part + [0] * (width - len(part)) for part in unread], device=device)
    first_B1 = torch.tensor([[len(text) - len(part)] for text, part in zip(texts, unread, strict=True)], device=device)
    positions_BT = first_B1 + torch.arange(width, device=device)
    rows_B, last_B = torch.arange(len(unread)), torch.tensor([len(part) - 1 for part in unread])

    def head(h_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        return h_BTD[rows_B, last_B] @ weight_VD.T

    return model(tokens_BT, positions_BT=positions_BT, cache=cache, head=head).float().cpu()
