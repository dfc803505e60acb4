"""Speed of the head and its loss, forward and backward: python -m benchmarks.loss [--tokens 8192]

The floor is the measured time of the head's three matrix products.
"""

import argparse
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.timing import median_ms, where
from model.loss import linear_cross_entropy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=103168)
    arguments = parser.parse_args()
    n, d, v = arguments.tokens, arguments.width, arguments.vocab
    on_cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if on_cuda else "cpu"), torch.bfloat16 if on_cuda else torch.float32
    h = torch.randn(n, d, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(v, d, device=device, dtype=dtype) * 0.02).requires_grad_()
    labels, weights = torch.randint(0, v, (n,), device=device), torch.full((n,), 1 / n, device=device)
    part, logits = h.detach()[: min(n, 4096)], torch.randn(min(n, 4096), v, device=device, dtype=dtype)

    def products() -> None:
        _ = part @ weight.T, logits @ weight, logits.T @ part

    floor = median_ms(products, device) * n / len(part)
    print(f"{where(device)}; {n:,} tokens, width {d}, vocabulary {v:,}; the three matrix products: {floor:.2f} ms")
    print(f"{'loss':34} {'ms':>9} {'of floor':>9} {'GiB without inputs':>18}")

    def plain() -> torch.Tensor:
        return F.cross_entropy((h @ weight.T).float(), labels)

    losses: dict[str, Callable[[], torch.Tensor]] = {
        f"this project, chunks of {chunk:,}": lambda chunk=chunk: linear_cross_entropy(
            h, weight, labels, weights, chunk_tokens=chunk
        )[0]
        for chunk in (1024, 2048, 4096, 8192)
    }
    losses["F.cross_entropy of full logits"] = plain
    if on_cuda and importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

        liger = LigerFusedLinearCrossEntropyLoss()
        losses["Liger's fused linear cross entropy"] = lambda: liger(weight, h, labels)
    for name, loss in losses.items():

        def both(loss=loss) -> None:
            h.grad = weight.grad = None
            loss().backward()

        if on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        took_ms = median_ms(both, device)
        gib = f"{(torch.cuda.max_memory_allocated() - before) / 2**30:18.2f}" if on_cuda else ""
        print(f"{name:34} {took_ms:9.2f} {floor / took_ms:9.1%} {gib}", flush=True)


if __name__ == "__main__":
    main()
