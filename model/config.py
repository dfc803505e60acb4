"""Model configuration. Imports no torch, so that a wrong value is reported at once."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from omegaconf import MISSING

from launch.config import UserError

# Layers by name; any other class is named as `module:Class`.
MLPS = {"swiglu": "model.layers:SwiGLU"}
ATTENTION_LAYERS = {"gqa": "model.attention:SelfAttention"}


class ModelError(UserError):
    """A model that cannot be built, loaded or converted. The message is for the user."""


class Init(Enum):
    internlm = "internlm"  # InternEvo's: the residual projections wo and w_down scaled by depth
    internlm_v1 = "internlm_v1"  # exactly InternLM v0.2.1's: w_up scaled instead of w_down
    llama = "llama"  # 0.02 everywhere, wo and w_down scaled by depth


class Attention(Enum):
    auto = "auto"
    flash_attn_4 = "flash_attn_4"
    flash_attn = "flash_attn"
    varlen = "varlen"
    cudnn = "cudnn"
    sdpa = "sdpa"
    reference = "reference"


class Parametrization(Enum):
    standard = "standard"
    mup = "mup"  # learning rates transfer from a model of base_width
    completep = "completep"  # and of base_depth (arXiv:2505.01618)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    # free=True: may change on resume and init_from; free="weights": only on init_from, because it changes training
    name: str = field(default=MISSING, metadata={"free": True})  # part of the run folder, such as runs/7b_pile_small
    # int, or `auto`, which conf.schema.to_config replaces by the vocabulary size of the data
    vocab_size: Any = field(default=MISSING, metadata={"number": True})
    d_model: int = MISSING
    n_layers: int = MISSING
    n_heads: int = MISSING
    n_kv_heads: int = MISSING
    d_ff: int = MISSING
    mlp: str = "swiglu"
    attention_layer: str = "gqa"
    attention_bias: bool = False  # on q, k, v and o, as InternLM-1 has it
    max_seq_len: int = field(default=MISSING, metadata={"free": True})  # the longest sequence the model is meant for
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    parametrization: Parametrization = Parametrization.standard
    base_width: int = 256  # d_model and n_layers of the model that the learning rates were tuned on
    base_depth: int = 4
    init: Init = field(default=Init.internlm, metadata={"free": True})
    attention: Attention = field(default=Attention.auto, metadata={"free": True})
    embed_grad_scale: float = field(default=1.0, metadata={"free": "weights"})  # of its gradient (arXiv:2210.02414)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def width_ratio(self) -> float:
        """Divisor of the logits."""
        return 1.0 if self.parametrization is Parametrization.standard else self.d_model / self.base_width

    @property
    def depth_ratio(self) -> float:
        """Divisor of what attention and MLP add to the residual stream."""
        return self.n_layers / self.base_depth if self.parametrization is Parametrization.completep else 1.0

    def problems(self) -> Iterator[str]:
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "max_seq_len")
        for key in (*sizes, "base_width", "base_depth"):
            if not isinstance(value := getattr(self, key), int) or value < 1:
                yield f"model.{key} ({value}) must be a number, at least 1"
                return
        if self.d_model % self.n_heads:
            yield f"model.d_model ({self.d_model}) must be divisible by model.n_heads ({self.n_heads})"
        elif self.head_dim % 2:
            yield f"model.d_model / model.n_heads ({self.head_dim}) must be even for rotary embeddings"
        if self.n_heads % self.n_kv_heads:
            yield f"model.n_heads ({self.n_heads}) must be divisible by model.n_kv_heads ({self.n_kv_heads})"
        for key, known in (("mlp", MLPS), ("attention_layer", ATTENTION_LAYERS)):
            if (name := getattr(self, key)) not in known and ":" not in name:
                yield f"model.{key} ({name}) must be one of {', '.join(known)}, or module:Class"
        if not 0 < self.embed_grad_scale <= 1:
            yield f"model.embed_grad_scale ({self.embed_grad_scale}) must be in (0, 1]"


def shape_keys() -> list[str]:
    """Return the fields that two models must agree on to share weights."""
    return [f.name for f in fields(ModelConfig) if not f.metadata.get("free")]
