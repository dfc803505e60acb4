"""The engine's step compared with plain PyTorch: python -m benchmarks.plain [--model 125m] [--tokens 512]

The plain step is nanoGPT's with this model's layers: F.scaled_dot_product_attention, F.cross_entropy of full logits,
clip_grad_norm_, torch.optim.AdamW(fused=True). Both alternate on the same batch; the fastest step of each counts,
because other processes can only slow a step down.
"""

import argparse
import time
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.batches import micro_batches
from benchmarks.timing import synchronize, where
from benchmarks.train_step import build, configure
from model.config import ModelConfig
from parallel.mesh import Mesh


class Layer(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads, self.bias = c.n_heads, c.attention_bias
        self.norm1, self.norm2 = nn.RMSNorm(c.d_model, c.norm_eps), nn.RMSNorm(c.d_model, c.norm_eps)
        self.qkv, self.out = (nn.Linear(c.d_model, n * c.d_model, bias=self.bias) for n in (3, 1))
        self.gate_up, self.down = nn.Linear(c.d_model, 2 * c.d_ff, bias=False), nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(d, dim=-1))
        q, k = (torch.cat([y.chunk(2, -1)[0] * cos - y.chunk(2, -1)[1] * sin,
                           y.chunk(2, -1)[1] * cos + y.chunk(2, -1)[0] * sin], -1) for y in (q, k))  # fmt: skip
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Plain(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(c.vocab_size, c.d_model), nn.RMSNorm(c.d_model, c.norm_eps)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.n_layers))
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.half_dim, self.theta = c.head_dim // 2, c.rope_theta

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        angles = torch.arange(tokens.shape[1])[:, None] * self.theta ** -(torch.arange(self.half_dim) / self.half_dim)
        cos, sin = angles.cos().to(tokens.device), angles.sin().to(tokens.device)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="125m")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=256, help="loss.chunk_tokens of the engine")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device("cpu")
    shape = (
        f"data.seq_len={arguments.tokens // 2}",
        "data.micro_batch_size=2",
        f"global_batch_tokens={arguments.tokens}",
    )
    config = configure((f"model={arguments.model}", "precision=fp32", *shape, f"loss.chunk_tokens={arguments.chunk}"))
    engine, plain = build(config, Mesh(device=device)), Plain(config.model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, fused=True)
    batches = list(islice(micro_batches(config.model.vocab_size, 2, config.data.seq_len, "equal"), 1))

    def step() -> None:
        plain(batches[0].tokens_BT.long(), batches[0].labels_BT.long()).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def timed(work: object) -> float:
        start = time.perf_counter()
        work()  # type: ignore[operator]
        synchronize(device)
        return time.perf_counter() - start

    pairs = [(timed(lambda: engine.train_step(batches)), timed(step)) for _ in range(arguments.turns + 1)][1:]
    engine_s, plain_s = (min(times) for times in zip(*pairs, strict=True))
    print(f"{where(device)}; {config.model.name}, {arguments.tokens} tokens per step, fp32")
    for name, s in (("engine", engine_s), ("plain", plain_s)):
        print(f"{name:6} {s:8.3f} s  {arguments.tokens / s:7.0f} tokens/s, {s / plain_s:.2f} of plain")


if __name__ == "__main__":
    main()
