"""Training speed compared with other projects, in one run: python -m benchmarks.peers [--seconds 15]

InternLM-7B's shape, 2 micro-batches of 4 x 2,048 tokens per step. Peers have compiled blocks, cuDNN attention if
available, Liger's loss (Transformers), bf16 weights, gradients and moments, and torch's fused AdamW. This project has
fp32 masters and, unless stated otherwise, fp32 moments.
"""

import argparse
import gc
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.batches import micro_batches
from benchmarks.timing import synchronize, where
from benchmarks.train_step import CASES, configure, measure
from model.config import ModelConfig
from parallel.mesh import Mesh

ROWS, ROW_LEN, ACCUMULATED = 4, 2048, 2


def transformers_llama(config: ModelConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """Build Hugging Face's Llama, compiled per layer, with Liger's fused linear cross entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {"attn_implementation": "sdpa", "dtype": "bfloat16"}
    llama = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads,
        max_position_embeddings=ROW_LEN, attention_bias=config.attention_bias, use_cache=False,
        **settings,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(llama).bfloat16()
    for layer in model.model.layers:
        layer.compile()
    loss = LigerFusedLinearCrossEntropyLoss()

    def forward(tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = model.model(input_ids=tokens).last_hidden_state
        return loss(model.lm_head.weight, hidden.flatten(0, 1), labels.flatten())

    forward.model = model  # type: ignore[attr-defined]
    return forward


def torchtitan_llama(config: ModelConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """Build torchtitan's Llama 3, without biases, compiled per block, with a compiled loss."""
    from torchtitan.models.llama3 import Transformer, TransformerModelArgs  # type: ignore[import-not-found]

    arguments = TransformerModelArgs(
        dim=config.d_model, n_layers=config.n_layers, n_heads=config.n_heads, n_kv_heads=config.n_kv_heads,
        vocab_size=config.vocab_size, multiple_of=256, ffn_dim_multiplier=None, rope_theta=config.rope_theta,
        max_seq_len=ROW_LEN,
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Transformer(arguments)
    torch.set_default_dtype(default)
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cuda"))
    for block in model.layers.values():
        block.compile(fullgraph=True)
    cross_entropy = torch.compile(
        lambda logits, labels: F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
    )

    def forward(tokens: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(model(tokens), labels)

    forward.model = model  # type: ignore[attr-defined]
    return forward


def speed(
    build: Callable[[ModelConfig], Callable[[Tensor, Tensor], Tensor]], config: ModelConfig, seconds: float
) -> float:
    """Return the tokens per second of a peer."""
    forward = build(config)
    model: nn.Module = forward.model  # type: ignore[attr-defined]
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    source = micro_batches(config.vocab_size, ROWS, ROW_LEN, "equal")

    def step() -> None:
        for batch in islice(source, ACCUMULATED):
            tokens, labels = (x.cuda(non_blocking=True).long() for x in (batch.tokens_BT, batch.labels_BT))
            (forward(tokens, labels) / ACCUMULATED).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        for _ in range(3):
            step()
        synchronize(params[0].device)
        start, steps = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            step()
            steps += 1
            synchronize(params[0].device)
        taken = time.perf_counter() - start
    return steps * ACCUMULATED * ROWS * ROW_LEN / taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0)
    arguments = parser.parse_args()
    device = torch.device("cuda", 0)
    config = configure(CASES["7b_16k"][1]).model
    print(f"{where(device)}; {ACCUMULATED * ROWS * ROW_LEN:,} tokens per step")
    peers: dict[str, float] = {}
    for name, build in (("torchtitan", torchtitan_llama), ("transformers, Liger", transformers_llama)):
        try:
            peers[name] = speed(build, config, arguments.seconds)
            print(f"{name:44} {peers[name]:9,.0f} tokens/s", flush=True)
        except (ImportError, RuntimeError) as error:
            print(f"{name:44} did not run: {str(error).splitlines()[0]}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    best = max(peers.values(), default=0.0)
    for name, extra in (
        ("this project, fp32 masters and moments", ()),
        ("this project, fp32 masters, bf16 moments", ("optimizer.state_dtype=bf16",)),
        ("this project, bf16 moments, fp8 products", ("optimizer.state_dtype=bf16", "precision.fp8=tensorwise")),
    ):
        tokens_per_s = measure("7b_16k", Mesh(device=device), arguments.seconds, extra)["tokens_per_s"]
        ratio = f"{tokens_per_s / best:.3f} of the best peer" if best else ""
        print(f"{name:44} {tokens_per_s:9,.0f} tokens/s  {ratio}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
