"""The decoder: embedding, blocks, norm, head.

Shape letters, here and in `parallel/` and `data/`: B batch (packs), T tokens of a row, N tokens of a flattened batch,
D d_model, H query heads, G key/value heads, K head_dim, F d_ff, V vocabulary.
"""

import hashlib
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import KVCache, Segments, attend, masked_attend
from model.config import ATTENTION_LAYERS, MLPS, Attention, ModelConfig, ModelError, Parametrization
from model.layers import AuxLosses, RMSNorm, Weight, rotary_angles, scales_of


class Block(nn.Module):
    """A layer: the part before attention (`project`), attention, and the part after it (`finish`).

    Attention is separate because its sequence lengths vary per batch; the parts around it have
    static shapes and compile once.
    """

    WEIGHTS: ClassVar = {
        "attention_norm": Weight("norm", "input_layernorm"),
        "mlp_norm": Weight("norm", "post_attention_layernorm"),
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention: Any = layer_class("attention_layer", config.attention_layer, ATTENTION_LAYERS)(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = layer_class("mlp", config.mlp, MLPS)(config)
        self.attend = attend  # replaced by context parallelism
        self.residual_scale = 1 / config.depth_ratio

    def forward(
        self, x_BTD: Tensor, cos_sin: tuple[Tensor, Tensor], segments: Segments, cache: KVCache | None, layer: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the new hidden states, and the auxiliary losses of attention and MLP by name."""
        q_BTHK, k_BTGK, v_BTGK = self.project(x_BTD, *cos_sin)
        if cache is None:
            out_BTHK = self.attend(q_BTHK, k_BTGK, v_BTGK, segments=segments)
        else:
            k_BSGK, v_BSGK = cache.update(layer, k_BTGK, v_BTGK)
            out_BTHK = masked_attend(q_BTHK, k_BSGK, v_BSGK, cache.mask_B1TS)
        return self.finish(x_BTD, out_BTHK)

    def project(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention.project(self.attention_norm(x_BTD), cos, sin)

    def finish(self, x_BTD: Tensor, out_BTHK: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out_BTD, attention_losses = _with_losses(self.attention.output(out_BTHK))
        x_BTD = torch.add(x_BTD, out_BTD, alpha=self.residual_scale)
        out_BTD, mlp_losses = _with_losses(self.mlp(self.mlp_norm(x_BTD)))
        return torch.add(x_BTD, out_BTD, alpha=self.residual_scale), {**attention_losses, **mlp_losses}


class Transformer(nn.Module):
    """A pre-norm decoder as in InternLM and Llama."""

    WEIGHTS: ClassVar = {  # standard deviations: internlm, internlm_v1, llama
        "embed": Weight("rowwise", "model.embed_tokens", 0.0052, 0.0052, 0.02),  # a lookup's input is the vocabulary
        "norm": Weight("norm", "model.norm"),
        "head": Weight("colwise", "lm_head", 0.0052, 0.0052, 0.02),
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Not drawn here: on the meta device, nn.Embedding's init takes a second to import torch's compiler.
        table_VD = torch.empty(config.vocab_size, config.d_model)
        self.embed: nn.Embedding | None = nn.Embedding.from_pretrained(table_VD, freeze=False)
        self.blocks = nn.ModuleDict({str(layer): Block(config) for layer in range(config.n_layers)})
        self.norm: RMSNorm | None = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)

    @classmethod
    def on_meta(cls, config: ModelConfig) -> "Transformer":
        with torch.device("meta"):
            return cls(config)

    @property
    def tied_params(self) -> dict[str, str]:
        """Name of a parameter -> name of the one it must stay equal to: a tied head that was copied."""
        return {"head.weight": "embed.weight"} if self.config.tie_embeddings and self.head is not None else {}

    def untie_head(self) -> None:
        """Make a separate head for tied embeddings, for when the two are on different ranks."""
        if self.config.tie_embeddings:
            self.head = nn.Linear(self.config.d_model, self.config.vocab_size, bias=False)

    def keep_layers(self, layers: Collection[int]) -> None:
        """Drop all other layers, keeping names. The embedding stays with the first layer, norm and head with the last.

        Without the embedding, the input is hidden states; without the norm, the output is.
        """
        self.blocks = nn.ModuleDict({str(layer): self.blocks[str(layer)] for layer in sorted(layers)})
        if 0 not in layers:
            self.embed = None
        if self.config.n_layers - 1 not in layers:
            self.norm = self.head = None

    def make_stage(self, layers: Collection[int]) -> "Transformer":
        """Return a model of some of the layers, with shared weights."""
        stage = Transformer.__new__(Transformer)
        nn.Module.__init__(stage)
        stage.config = self.config
        stage.embed, stage.blocks, stage.norm, stage.head = self.embed, self.blocks, self.norm, self.head
        stage.keep_layers(layers)
        return stage

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seq_len: int | None = None,
        row_len: int | None = None,
        cache: KVCache | None = None,
        head: Callable[[Tensor, Tensor], Any] = F.linear,
        aux: AuxLosses | None = None,
    ) -> Any:
        """Return logits_BTV, or `head(h_BTD, weight_VD)` of the last hidden states.

        `cu_seqlens` (int32) are the segment boundaries in the flattened batch and `max_seq_len` the longest segment;
        without them each row is one segment. With a `cache`, the tokens continue the cached ones at `positions_BT`.
        `row_len` is the full row length if `tokens_BT` holds slices of rows. Auxiliary losses are added to `aux`, or
        dropped without it.
        """
        rows, row_len, device = len(tokens_BT), row_len or tokens_BT.shape[1], tokens_BT.device
        if positions_BT is None:
            positions_BT = torch.arange(row_len, device=device).expand(rows, row_len)
        if cu_seqlens is None or max_seq_len is None:
            cu_seqlens = torch.arange(0, (rows + 1) * row_len, row_len, device=device, dtype=torch.int32)
            max_seq_len = row_len
        x_BTD = tokens_BT if self.embed is None else self._embed(self.embed, tokens_BT)
        if cache is not None:
            cache.set_positions(positions_BT)
        backend = Attention.sdpa if cache is not None else self.config.attention
        segments = Segments.of(cu_seqlens, max_seq_len, (rows, row_len), backend, x_BTD.dtype)
        cos_sin = rotary_angles(positions_BT, self.config.head_dim, self.config.rope_theta)
        for layer, block in self.blocks.items():
            x_BTD, losses = block(x_BTD, cos_sin, segments, cache, int(layer))
            if aux is not None:
                x_BTD = aux.attach(x_BTD, losses)
        output = self.head or self.embed
        if self.norm is None or output is None:
            return x_BTD
        x_BTD = self.norm(x_BTD)
        if self.config.width_ratio != 1:
            x_BTD = x_BTD / self.config.width_ratio
        return head(x_BTD, output.weight)

    def _embed(self, embed: nn.Embedding, tokens_BT: Tensor) -> Tensor:
        x_BTD, scale = embed(tokens_BT), self.config.embed_grad_scale
        return x_BTD if scale == 1 else x_BTD * scale + x_BTD.detach() * (1 - scale)

    def known_weights(self) -> Iterator[tuple[str, Weight]]:
        """Yield path and `Weight` of every layer or parameter listed in a module's `WEIGHTS`."""
        for path, module in self.named_modules():
            for name, weight in getattr(module, "WEIGHTS", {}).items():
                if getattr(module, name) is not None:
                    yield f"{path}.{name}" if path else name, weight

    def tp_plan(self) -> dict[str, str]:
        """Return the tensor-parallel style of each module with parameters, by path: colwise, rowwise or norm."""
        plan = {path: weight.tp for path, weight in self.known_weights()}
        for path, module in self.named_modules():
            if path not in plan and next(module.parameters(recurse=False), None) is not None:
                raise ModelError(f"{path} ({type(module).__name__}) has no tp style in WEIGHTS; use parallel.tp=1")
        return plan

    def init_stds(self) -> dict[str, float | None]:
        """Return the initial standard deviation of each parameter; None for norms (1) and other vectors (0)."""
        known, stds = dict(self.known_weights()), dict[str, float | None]()
        for name, param in self.named_parameters():
            weight = known.get(name) or known.get(name.rpartition(".")[0]) or Weight("norm")
            # completep scales by depth in the forward pass instead
            by_depth = name.startswith("blocks.") and self.config.parametrization is not Parametrization.completep
            layer = int(name.split(".")[1]) if by_depth else 0
            std = weight.std(self.config.init, layer) * scales_of(self.config, name, param.ndim).std
            stds[name] = None if param.ndim == 1 else std
        return stds

    @torch.no_grad()
    def init_weights(
        self, seed: int, params: Mapping[str, Any] | None = None, write: Callable[[Any, Tensor], object] = Tensor.copy_
    ) -> None:
        """Draw every parameter in fp32, from a generator seeded by `seed` and the parameter's name.

        The weights do not depend on device, dtype or layout, and tied parameters are equal. `params` replaces the
        model's parameters, for example by shards that know the full shape, and `write(param, full)` sets one.
        """
        params = params or dict(self.named_parameters())
        for name, std in self.init_stds().items():
            param = params[name]
            if std is None:
                write(param, torch.full(param.shape, 1.0 if name.endswith("norm.weight") else 0.0))
                continue
            digest = hashlib.sha256(f"{seed}/{self.tied_params.get(name, name)}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            write(param, torch.empty(param.shape, dtype=torch.float32).normal_(0.0, std, generator=generator))


def layer_class(key: str, name: str, known: dict[str, str]) -> type[nn.Module]:
    """Return the class that `model.<key>` names; raise `ModelError` if it cannot be imported."""
    try:
        return pkgutil.resolve_name(known.get(name, name))
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(f"model.{key} ({name}): {error}") from None


def _with_losses(output: Tensor | tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    return output if isinstance(output, tuple) else (output, {})
