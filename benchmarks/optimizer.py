"""How fast an update is, against the bytes it must move: python -m benchmarks.optimizer [--layers 8]

The parameters are those of some of 7b's layers. The floor is one read of everything that is read and one write of
everything that is written, at the rate of a large copy.
"""

import argparse
import gc
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.timing import copy_tbps, median_ms, where
from training.config import Dtype, OptimizerConfig, OptimizerImpl, TrainingError
from training.optim.optimizer import build_optimizer


def layers(count: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    return nn.ModuleList(nn.Linear(k, n, device=device, dtype=dtype) for _ in range(count) for n, k in shapes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth = copy_tbps(device)
    scalars = {"grad_scale": torch.ones((), device=device), "finite": torch.tensor(True, device=device)}
    print(f"{where(device)}; a large copy: {bandwidth:.2f} TB/s")
    print(f"{'update':44} {'bytes':>6} {'ms':>8} {'floor ms':>9} {'of floor':>9} {'ms for 7b':>10}")
    for name, impl, state, moved in (
        ("one kernel, fp32 moments", "triton", Dtype.fp32, 26),
        ("one kernel, bf16 moments", "triton", Dtype.bf16, 18),
        ("torch's fused on joined masters, fp32 moments", "torch", Dtype.fp32, 26),
        ("apex, fp32 moments", "apex", Dtype.fp32, 26),
        ("torch.optim.AdamW(fused=True), all bf16", None, Dtype.bf16, 14),
    ):
        model = layers(arguments.layers, device, torch.bfloat16)
        grads = [torch.randn_like(p) for p in model.parameters()]
        numel = sum(p.numel() for p in model.parameters())
        if impl is None:
            plain = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            step: Any = plain.step
        else:
            try:
                ours = build_optimizer(model, OptimizerConfig(impl=OptimizerImpl(impl), state_dtype=state))
            except TrainingError as error:
                print(f"{name:44} {error}")
                continue
            ours.set_schedule([(1e-4, 0.95)] * 100_000)
            step = partial(ours.step, **scalars)

        def update(model: nn.Module = model, grads: list = grads, step=step) -> None:
            for param, grad in zip(model.parameters(), grads, strict=True):
                param.grad = grad
            step()

        took, floor = median_ms(update, device), moved * numel / bandwidth / 1e9
        print(
            f"{name:44} {moved:6} {took:8.2f} {floor:9.2f} {floor / took:9.1%} {took / numel * 7.322e9:10.1f}",
            flush=True,
        )
        del model, grads, update, step
        gc.collect()


if __name__ == "__main__":
    main()
