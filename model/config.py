"""What a model is: its shape, its initialisation, and the counts that follow from them.

Free of torch, so that a wrong value is refused before torch is imported.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING


class ModelError(Exception):
    """A model that cannot be built, loaded or converted, told as a sentence for the user."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a Hugging Face folder."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: {path.parent} is no Hugging Face model folder") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None


class Init(Enum):
    internlm = "internlm"  # InternEvo's: the residual projections wo and w_down scaled by depth
    internlm_v1 = "internlm_v1"  # InternLM v0.2.1 to the letter: w_up scaled instead of w_down
    llama = "llama"  # 0.02 everywhere, wo and w_down scaled by depth


class Attention(Enum):
    auto = "auto"
    flash_attn_4 = "flash_attn_4"
    flash_attn = "flash_attn"
    varlen = "varlen"
    cudnn = "cudnn"
    sdpa = "sdpa"
    reference = "reference"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    # A field marked `free` may differ between models that share weights; one that decides what is learnt only "weights"
    name: str = field(default=MISSING, metadata={"free": True})  # part of the run folder, such as runs/7b_pile_small
    vocab_size: int = MISSING
    d_model: int = MISSING
    n_layers: int = MISSING
    n_heads: int = MISSING
    n_kv_heads: int = MISSING
    d_ff: int = MISSING
    attention_bias: bool = False  # on q, k, v and o, as InternLM-1 has it
    max_seq_len: int = field(default=MISSING, metadata={"free": True})  # the longest sequence the model is meant for
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init: Init = field(default=Init.internlm, metadata={"free": True})
    attention: Attention = field(default=Attention.auto, metadata={"free": True})
    embed_grad_scale: float = field(default=1.0, metadata={"free": "weights"})  # on its gradient (arXiv:2210.02414)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def n_params(self) -> int:
        """Parameters of the whole model, embedding and head included."""
        kv_dim = self.n_kv_heads * self.head_dim
        attention = 2 * self.d_model * (self.d_model + kv_dim)
        if self.attention_bias:
            attention += 2 * (self.d_model + kv_dim)
        layer = attention + 3 * self.d_model * self.d_ff + 2 * self.d_model
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return embeddings + self.n_layers * layer + self.d_model

    def flops_per_token(self, seq_len: int) -> float:
        """Forward and backward FLOPs of a token, causal attention counted once, nothing recomputed.

        Six per weight that is multiplied (the embedding is looked up, not multiplied), and two
        products of `(seq_len + 1) / 2` keys on average, forward and twice backward.
        """
        kv_dim = self.n_kv_heads * self.head_dim
        layer = 2 * self.d_model * (self.d_model + kv_dim) + 3 * self.d_model * self.d_ff
        matmul = self.n_layers * layer + self.vocab_size * self.d_model
        attention = self.n_layers * 2 * self.d_model * (seq_len + 1) / 2
        return 6 * (matmul + attention)

    def internlm_flops_per_token(self, seq_len: int, *, recompute: bool = False) -> float:
        """FLOPs of a token by InternLM's published formula, which its TFLOP/s figures use.

        Full attention, no grouped queries, and with `recompute` a second forward pass
        (`get_megatron_flops` in InternLM v0.2.1).
        """
        factor = 4 if recompute else 3
        # Its mlp_ratio is the one before the width was rounded up to a multiple of 256.
        rounded = -(-int(self.d_model * 8 / 3) // 256) * 256
        mlp_ratio = 8 / 3 if self.d_ff == rounded else self.d_ff / self.d_model
        layer = factor * ((8 + 6 * mlp_ratio) * self.d_model**2 + 4 * seq_len * self.d_model)
        return layer * self.n_layers + 6 * self.d_model * self.vocab_size

    def problems(self) -> Iterator[str]:
        for key in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "max_seq_len"):
            if getattr(self, key) < 1:
                yield f"model.{key} ({getattr(self, key)}) must be at least 1"
                return
        if self.d_model % self.n_heads:
            yield f"model.d_model ({self.d_model}) must be divisible by model.n_heads ({self.n_heads})"
        elif self.head_dim % 2:
            yield (
                f"model.d_model / model.n_heads ({self.head_dim}) must be even, because rotary embeddings turn pairs"
            )
        if self.n_heads % self.n_kv_heads:
            yield f"model.n_heads ({self.n_heads}) must be divisible by model.n_kv_heads ({self.n_kv_heads})"
        if self.rope_theta <= 0:
            yield f"model.rope_theta ({self.rope_theta}) must be positive"
        if self.norm_eps <= 0:
            yield f"model.norm_eps ({self.norm_eps}) must be positive"
        if not 0 < self.embed_grad_scale <= 1:
            yield f"model.embed_grad_scale ({self.embed_grad_scale}) must be in (0, 1]"
