"""The decoder: embedding, blocks, norm, head."""

import hashlib
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Segments, SelfAttention, attend, masked_attend, resolve_backend, segments_of
from model.config import Attention, Init, ModelConfig
from model.kv_cache import KVCache
from model.layers import RMSNorm, SwiGLU, rotary_angles


class Block(nn.Module):
    """A layer: what comes before attention, attention, and what comes after.

    Attention stands alone because its lengths change from batch to batch: the parts around it have one
    shape, and can be compiled once.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = SelfAttention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config.d_model, config.d_ff)
        self.attend = attend  # replaced where the tokens of a row are divided

    def forward(
        self,
        x_BTD: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        segments: Segments | None,
        backend: Attention,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        q_BTHK, k_BTGK, v_BTGK = self.project(x_BTD, *cos_sin)
        if cache is None:
            assert segments is not None
            out_BTHK = self.attend(q_BTHK, k_BTGK, v_BTGK, segments=segments, backend=backend)
        else:
            k_BSGK, v_BSGK = cache.update(layer, k_BTGK, v_BTGK)
            out_BTHK = masked_attend(q_BTHK, k_BSGK, v_BSGK, cache.mask_B1TS)
        return self.finish(x_BTD, out_BTHK)

    def project(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention.project(self.attention_norm(x_BTD), cos, sin)

    def finish(self, x_BTD: Tensor, out_BTHK: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention.wo(out_BTHK.flatten(-2))
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Transformer(nn.Module):
    """A pre-norm decoder as InternLM and Llama have it. Built on the current default device."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Not drawn yet: on the meta device that would take a second to bring in torch's compiler.
        table_VD = torch.empty(config.vocab_size, config.d_model)
        self.embed: nn.Embedding | None = nn.Embedding.from_pretrained(table_VD, freeze=False)
        self.blocks = nn.ModuleDict({str(layer): Block(config) for layer in range(config.n_layers)})
        self.norm: RMSNorm | None = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def tied_params(self) -> dict[str, str]:
        """What must stay equal to another parameter, by name: a tied head with a matrix of its own."""
        return {"head.weight": "embed.weight"} if self.config.tie_embeddings and self.head is not None else {}

    def init_stds(self) -> dict[str, float | None]:
        return {name: init_std(name, self.config) for name, _ in self.named_parameters()}

    def untie_head(self) -> None:
        """Give a tied head a copy of the embedding, where they are in different places."""
        if self.config.tie_embeddings:
            self.head = nn.Linear(self.config.d_model, self.config.vocab_size, bias=False)

    def keep_layers(self, layers: Collection[int]) -> None:
        """Drop all but some layers, under their names: the embedding stays with the first, norm and head with the last.

        Without the embedding a model takes hidden states for tokens, without the norm it gives hidden states.
        """
        self.blocks = nn.ModuleDict({str(layer): self.blocks[str(layer)] for layer in sorted(layers)})
        if 0 not in layers:
            self.embed = None
        if self.config.n_layers - 1 not in layers:
            self.norm = self.head = None

    def make_stage(self, layers: Collection[int]) -> "Transformer":
        """Give some of the layers as a model of their own, which shares their weights."""
        part = Transformer.__new__(Transformer)
        nn.Module.__init__(part)
        part.config = self.config
        part.embed, part.blocks, part.norm, part.head = self.embed, self.blocks, self.norm, self.head
        part.keep_layers(layers)
        return part

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seq_len: int | None = None,
        row_len: int | None = None,
        cache: KVCache | None = None,
        head: Callable[[Tensor, Tensor], Any] | None = None,
    ) -> Any:
        """Give logits_BTV, or what `head(h_BTD, weight_VD)` makes of the last hidden states.

        `cu_seqlens` (int32) and `max_seq_len` say where the segments of a pack begin, counted over
        the flattened batch; without them each row is one segment. With a `cache`, the tokens
        continue the cached ones at `positions_BT`. `row_len` is a row's length where `tokens_BT` are slices of rows.
        """
        rows, row_len = len(tokens_BT), row_len or tokens_BT.shape[1]
        device = tokens_BT.device
        if positions_BT is None:
            positions_BT = torch.arange(row_len, device=device).expand(rows, row_len)
        if cu_seqlens is None or max_seq_len is None:
            cu_seqlens = torch.arange(0, (rows + 1) * row_len, row_len, device=device, dtype=torch.int32)
            max_seq_len = row_len
        x_BTD = tokens_BT if self.embed is None else self._embed(self.embed, tokens_BT)
        backend, segments = Attention.sdpa, None
        if cache is None:
            equal = (len(cu_seqlens) - 1) * max_seq_len == rows * row_len
            backend = resolve_backend(self.config.attention, device, x_BTD.dtype, equal=equal)
            segments = segments_of(cu_seqlens, max_seq_len, rows, row_len, backend)
        else:
            cache.read(positions_BT)
        cos_sin = rotary_angles(positions_BT, self.config.head_dim, self.config.rope_theta)
        for layer, block in self.blocks.items():
            x_BTD = block(x_BTD, cos_sin, segments, backend, cache, int(layer))
        output = self.head or self.embed
        if self.norm is None or output is None:
            return x_BTD
        return (head or F.linear)(self.norm(x_BTD), output.weight)

    def _embed(self, embed: nn.Embedding, tokens_BT: Tensor) -> Tensor:
        x_BTD, scale = embed(tokens_BT), self.config.embed_grad_scale
        return x_BTD if scale == 1 else x_BTD * scale + x_BTD.detach() * (1 - scale)

    @torch.no_grad()
    def init_weights(self, seed: int, write: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """Draw every parameter in fp32 from a generator of its own, seeded by `seed` and its name.

        So the weights depend neither on the device, the dtype, the layout nor the order of drawing; copies are
        equal.
        `write(param, whole)` sets a parameter that may be a part of the whole.
        """
        for name, param in self.named_parameters():
            std = init_std(name, self.config)
            if std is None:
                write(param, torch.full(param.shape, 1.0 if name.endswith("norm.weight") else 0.0))
                continue
            digest = hashlib.sha256(f"{seed}/{self.tied_params.get(name, name)}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            write(param, torch.empty(param.shape, dtype=torch.float32).normal_(0.0, std, generator=generator))


def init_std(name: str, config: ModelConfig) -> float | None:
    """Give the standard deviation a parameter is drawn with; None for norms (1) and biases (0).

    With d = sqrt(2 (layer + 1)), the first layer being 0:

    | parameter   | internlm  | internlm_v1 | llama    |
    |-------------|-----------|-------------|----------|
    | embed, head | 0.0052    | 0.0052      | 0.02     |
    | wq, wk, wv  | 0.006     | 0.006       | 0.02     |
    | wo          | 0.006 / d | 0.006 / d   | 0.02 / d |
    | w_gate      | 0.006     | 0.006       | 0.02     |
    | w_up        | 0.006     | 0.006 / d   | 0.02     |
    | w_down      | 0.006 / d | 0.0015      | 0.02 / d |
    """
    *path, module, kind = name.split(".")
    if kind == "bias" or module.endswith("norm"):
        return None
    base = 0.02 if config.init is Init.llama else 0.006
    if module in ("embed", "head"):
        return 0.02 if config.init is Init.llama else 0.0052
    scaled = {"wo", "w_up"} if config.init is Init.internlm_v1 else {"wo", "w_down"}
    if module == "w_down" and config.init is Init.internlm_v1:
        return 0.0015
    return base / (2 * (int(path[1]) + 1)) ** 0.5 if module in scaled else base
