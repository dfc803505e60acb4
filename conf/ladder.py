"""Scaling rules of a model ladder, for configs: `${ladder:steps,${model.n_layers},${model.vocab_size}}`.

Learning rates transfer between sizes by `model.parametrization=completep`; these rules set the batch size and what
depends on it.
"""

import math
from collections.abc import Callable

HEAD_DIM = 64
WIDTH_PER_LAYER = 64  # a constant aspect ratio (Kaplan et al. 2020, arXiv:2001.08361, section 3.1)
TOKENS_PER_PARAM = 20  # Hoffmann et al. 2022, arXiv:2203.15556
# The critical batch grows as tokens^0.383 (Bergsma et al. 2025, arXiv:2505.13738), from 2^19 for the 125m model.
BATCH_EXPONENT = 0.383
BASE_BATCH, BASE_TOKENS = 2**19, 2.2e9


def n_params(d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, d_ff: int, vocab_size: int) -> int:
    """Return the number of weights in matrix products, which excludes the input embedding."""
    attention = 2 * d_model**2 + 2 * d_model * (d_model // n_heads) * n_kv_heads
    return n_layers * (attention + 3 * d_model * d_ff) + vocab_size * d_model


def width(n_layers: int) -> int:
    return WIDTH_PER_LAYER * n_layers


def n_heads(d_model: int) -> int:
    return d_model // HEAD_DIM


def d_ff(d_model: int) -> int:
    """Return 8/3 of the width, rounded up to a multiple of 64 (Shazeer 2020, arXiv:2002.05202)."""
    return -(-d_model * 8 // 3 // 64) * 64


def tokens(n_layers: int, vocab_size: int) -> int:
    d_model = width(n_layers)
    heads = n_heads(d_model)
    return TOKENS_PER_PARAM * n_params(d_model, n_layers, heads, heads, d_ff(d_model), vocab_size)


def batch_tokens(n_layers: int, vocab_size: int) -> int:
    """Return the batch size, rounded to a power of two."""
    batch = BASE_BATCH * (tokens(n_layers, vocab_size) / BASE_TOKENS) ** BATCH_EXPONENT
    return 1 << round(math.log2(batch))


def steps(n_layers: int, vocab_size: int) -> int:
    return round(tokens(n_layers, vocab_size) / batch_tokens(n_layers, vocab_size))


def lr(n_layers: int, vocab_size: int, base: float) -> float:
    """Scale the learning rate with the square root of the batch (Malladi et al. 2022, arXiv:2205.10287)."""
    return base * (batch_tokens(n_layers, vocab_size) / BASE_BATCH) ** 0.5


def weight_decay(n_layers: int, vocab_size: int, base: float) -> float:
    """Keep the AdamW timescale, batch / (lr * weight_decay * tokens), constant (arXiv:2505.13738)."""
    batch = batch_tokens(n_layers, vocab_size) / BASE_BATCH
    return base * batch**0.5 * BASE_TOKENS / tokens(n_layers, vocab_size)


RULES: dict[str, Callable[..., float]] = {
    rule.__name__: rule for rule in (width, n_heads, d_ff, batch_tokens, steps, lr, weight_decay)
}


def ladder(rule: str, *arguments: float) -> float:
    """Apply a rule by name; base learning rate and weight decay are those for a batch of 2^19 tokens."""
    return RULES[rule](*arguments)
