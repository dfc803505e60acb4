"""Hugging Face's InternLM2, read only: Llama with other tensor names and one matrix for q, k and v."""

from collections.abc import Iterable

from torch import Tensor

from model.config import ModelConfig
from model.hf.llama import Llama

NAMES = {
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


class InternLM2(Llama):
    architectures = ("InternLM2ForCausalLM",)

    def can_express(self, config: ModelConfig) -> bool:
        return False

    def names(self, config: ModelConfig) -> dict[str, str]:
        found = super().names(config)
        for theirs, other in NAMES.items():
            found = {ours: name.replace(theirs, other) for ours, name in found.items()}
        return found

    def split(self, name: str, tensor: Tensor, config: ModelConfig) -> Iterable[tuple[str, Tensor]]:
        """Split wqkv, whose rows are, per key head, its query heads, the key and the value."""
        if ".wqkv." not in name:
            return [(name, tensor)]
        groups = tensor.unflatten(0, (config.n_kv_heads, -1, config.head_dim))
        parts = {"q": groups[:, :-2].flatten(0, 2), "k": groups[:, -2].flatten(0, 1), "v": groups[:, -1].flatten(0, 1)}
        return [(name.replace("attention.wqkv", f"self_attn.{x}_proj"), part) for x, part in parts.items()]
