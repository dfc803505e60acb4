"""Speed of symmetric bf16 products, computed in full and by half: python -m benchmarks.symmetric

Prints ms and TFLOP/s of torch, and for each tile configuration ms, TFLOP/s by the full product's FLOPs, and the speedup
over torch. Rows named `steps` are five Newton-Schulz steps. Takes about three minutes on an H100.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import median_ms, where
from training.optim.muon import NEWTON_SCHULZ, n_flops
from training.optim.symmetric_kernel import TILES, Tiles, product

SHAPES = [(1, 768, 768), (1, 768, 2048), (1, 1024, 1024), (1, 2048, 2048), (1, 2048, 5632), (1, 4096, 4096)]
SHAPES += [(1, 4096, 11008), (1, 8192, 8192), (24, 768, 768), (24, 768, 2048), (16, 1024, 1024), (8, 2048, 2048)]
SHAPES += [(8, 2048, 5632), (4, 4096, 4096), (2, 4096, 11008)]
CHOICES = [
    TILES,
    Tiles(128, 256, 64, warps=8, stages=4),
    Tiles(128, 256, 64, warps=8, stages=3),
    Tiles(256, 128, 64, warps=8, stages=3),
    Tiles(128, 128, 64, warps=4, stages=3),  # two programs per SM
    Tiles(128, 64, 64, warps=4, stages=4),
    Tiles(128, 256, 64, warps=8, stages=3, tma=False),
]
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
Polynomial = Callable[[Tensor, float, float], Tensor]
Product = Callable[[], Tensor]


def compare(name: str, flops: float, torch_product: Product, products: list[Product], calls: int) -> None:
    """Print a row; mark results that are not symmetric, or differ from torch's by more than rounding."""
    expected = torch_product().float()
    base = median_ms(lambda: [torch_product() for _ in range(calls)], DEVICE, seconds=0.1) / calls
    row = f"{name:22} {base:8.3f} {flops / base / 1e9:4.0f}"
    for compute in products:
        try:
            found = compute()
            ms = median_ms(lambda compute=compute: [compute() for _ in range(calls)], DEVICE, seconds=0.1) / calls
        except Exception as error:  # continue with the other tiles
            row += f" | {type(error).__name__}: {str(error)[:60]}"
            continue
        close = (found.float() - expected).norm() <= 0.02 * expected.norm()  # False for nan
        asymmetric = found.shape[1] == found.shape[2] and calls > 1 and not torch.equal(found, found.mT)
        mark = ("" if close else "!") + ("~" if asymmetric else "")
        row += f" | {ms:7.3f} {flops / ms / 1e9:4.0f} {base / ms:4.2f}{mark}"
    print(row, flush=True)


def five_steps(x: Tensor, polynomial: Polynomial) -> Tensor:
    for a, b, c in NEWTON_SCHULZ:
        x = torch.baddbmm(x, polynomial(x, b, c), x, beta=a)
    return x


def full(x: Tensor, b: float, c: float) -> Tensor:
    square = x @ x.mT
    return torch.baddbmm(square, square, square, beta=b, alpha=c)


def by_half(tiles: Tiles) -> Polynomial:
    return lambda x, b, c: product(product(x, tiles=tiles), beta=b, alpha=c, tiles=tiles)


def main() -> None:
    print(f"{where(DEVICE)}; ! is wrong, ~ is not symmetric")
    for number, tiles in enumerate(CHOICES):
        print(f"choice {number}: {tiles}")
    names = [f"{f'choice {number}':17}" for number in range(len(CHOICES))]
    print(" | ".join([f"{'n x m x k':22} {'torch ms':>8} {'TF/s':>4}", *names]))
    _, b, c = NEWTON_SCHULZ[0]
    for n, m, k in SHAPES:
        torch.manual_seed(0)
        x = torch.randn(n, m, k, device=DEVICE, dtype=DTYPE)
        x /= x.norm(dim=(1, 2), keepdim=True)
        square, name = product(x), f"{n}x{m}x{k}"
        first: list = [lambda t=t, x=x: product(x, tiles=t) for t in CHOICES]
        compare(f"{name} X X^T", 2 * n * m * m * k, lambda x=x: x @ x.mT, first, calls=10)
        second: list = [lambda t=t, s=square: product(s, beta=b, alpha=c, tiles=t) for t in CHOICES]
        compare(f"{name} A^2", 2 * n * m**3, lambda s=square: torch.baddbmm(s, s, s, beta=b, alpha=c), second, calls=10)
        steps: list = [lambda t=t, x=x: five_steps(x, by_half(t)) for t in CHOICES]
        compare(f"{name} steps", n * n_flops((m, k)), lambda x=x: five_steps(x, full), steps, calls=1)


if __name__ == "__main__":
    main()
