"""Speed of each attention backend, forward and backward: python -m benchmarks.attention

TFLOP/s count the causal half only, and the backward pass as 2.5 forward passes. The last column is the share of the
rate of a large matrix product on this device.
"""

import argparse

import numpy as np
import torch

from benchmarks.loader import lengths
from benchmarks.timing import median_ms, product_tflops, where
from model.attention import Segments, attend, missing
from model.config import Attention

# name: documents of a micro-batch, row length, heads, key-value heads
SHAPES: dict[str, tuple[list[int], int, int, int]] = {
    "4 x 2048": ([2048] * 4, 2048, 32, 32),
    "2 x 4096": ([4096] * 2, 4096, 32, 32),
    "1 x 8192, 8 kv heads": ([8192], 8192, 32, 8),
}
BACKENDS = ("flash_attn_4", "flash_attn", "cudnn", "varlen", "sdpa", "reference")


def pile(row_len: int, rows: int) -> list[int]:
    """Draw document lengths like The Pile's, split at the ends of rows."""
    ends = lengths(np.random.default_rng(0), 4000).cumsum()
    ends = np.union1d(ends[ends < rows * row_len], np.arange(1, rows + 1) * row_len)
    return np.diff(ends, prepend=0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--backends", default=",".join(BACKENDS))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, scale = (torch.bfloat16, 1) if device.type == "cuda" else (torch.float32, 8)
    ceiling = product_tflops(device, size=8192 // scale, seconds=arguments.seconds)
    shapes = {**SHAPES, "The Pile in 4 x 2048": (pile(2048, 4), 2048, 32, 32)}
    print(f"{where(device)}; a large matrix product: {ceiling:.0f} TFLOP/s")
    print("documents              backend       forward ms  TFLOP/s backward ms  TFLOP/s    share")
    for name, (documents, row_len, heads, kv_heads) in shapes.items():
        documents, row_len = [max(1, n // scale) for n in documents], row_len // scale
        total = sum(documents) // row_len * row_len
        documents[-1] -= sum(documents) - total
        cu_seqlens = torch.tensor([0, *documents]).cumsum(0).int().to(device)
        flops = sum(2 * 128 * heads * n * (n + 1) for n in documents)
        for kind in arguments.backends.split(","):
            backend = Attention(kind)
            on_cuda_only = backend not in (Attention.sdpa, Attention.reference)
            if missing(backend) or (on_cuda_only and device.type != "cuda"):
                continue
            q, k, v = (
                torch.randn(total // row_len, row_len, n, 128, device=device, dtype=dtype, requires_grad=True)
                for n in (heads, kv_heads, kv_heads)
            )
            segments = Segments.of(cu_seqlens, max(documents), (total // row_len, row_len), backend, dtype)

            def forward(q=q, k=k, v=v, segments=segments) -> torch.Tensor:
                return attend(q, k, v, segments=segments)

            out = forward()
            grad = torch.randn_like(out)

            def backward(q=q, k=k, v=v, out=out, grad=grad) -> object:
                return torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

            forward_ms, backward_ms = (median_ms(f, device, seconds=arguments.seconds) for f in (forward, backward))
            times = (forward_ms, flops / forward_ms / 1e9, backward_ms, 2.5 * flops / backward_ms / 1e9)
            figures = "{:10.3f} {:8.0f} {:11.3f} {:8.0f}".format(*times)
            share = 3.5 * flops / ceiling / 1e9 / (forward_ms + backward_ms)
            print(f"{name:22} {kind:13} {figures} {share:8.1%}", flush=True)


if __name__ == "__main__":
    main()
