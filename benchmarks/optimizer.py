"""Speed of an update compared with memory bandwidth: python -m benchmarks.optimizer [--layers 8] [--only muon]

Updates the parameters of some of 7b's layers. The floor reads and writes each tensor once at the rate of a large copy.
`ms for 7b` is for all layers, with AdamW for embedding and head; `of step` is the share of a step of 524,288 tokens at
--tokens-per-s.
"""

import argparse
import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.timing import copy_tbps, median_ms, where
from training.config import Dtype, OptimizerConfig, OptimizerImpl, TrainingError
from training.optim.muon import n_flops
from training.optim.optimizer import Optimizer

LAYERS_NUMEL, REST_NUMEL = 6.477e9, 0.845e9  # of 7b: matrices of the blocks; embedding and head
STEP_TOKENS = 524_288
CASES: tuple[tuple[str, dict[str, Any] | str, int], ...] = (  # name, settings or torch's class, bytes per parameter
    ("one kernel, fp32 moments", {"impl": OptimizerImpl.triton}, 26),
    ("one kernel, bf16 moments", {"impl": OptimizerImpl.triton, "state_dtype": Dtype.bf16}, 18),
    ("torch fused, concatenated masters, fp32 moments", {"impl": OptimizerImpl.torch}, 26),
    ("apex, fp32 moments", {"impl": OptimizerImpl.apex}, 26),
    ("torch.optim.AdamW(fused=True), all bf16", "AdamW", 14),
    ("muon, fp32 momentum", {"name": "muon"}, 18),
    ("muon, bf16 momentum", {"name": "muon", "state_dtype": Dtype.bf16}, 14),
    ("muon, polar_express", {"name": "muon", "polar_express": True}, 18),
    ("muon, normuon", {"name": "muon", "normuon": True}, 18),
    ("torch.optim.Muon, all fp32", "Muon", 20),
)


def layers(count: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    linear = [nn.Linear(k, n, bias=False, device=device, dtype=dtype) for _ in range(count) for n, k in shapes]
    return nn.ModuleDict({"blocks": nn.ModuleList(linear)})  # update rules can depend on the name


def update_ms(optimizer: Optimizer | Sequence[torch.optim.Optimizer], device: torch.device) -> float:
    """Return the time of an update, without the backward pass."""
    if isinstance(optimizer, Optimizer):
        params = [param.shard for param in optimizer.params.values()]
        scalars: dict[str, Any] = {
            "grad_scale": torch.ones((), device=device),
            "finite": torch.tensor(True, device=device),
        }
        optimizer.set_schedule([(1e-4, 0.95)] * 100_000)
    else:
        params = [param for part in optimizer for group in part.param_groups for param in group["params"]]
    grads = [torch.randn_like(param) for param in params]

    def update() -> None:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        if isinstance(optimizer, Optimizer):
            optimizer.step(**scalars)
        else:
            for part in optimizer:
                part.step()

    return median_ms(update, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", default="", help="cases whose name contains this; the first is always measured")
    parser.add_argument("--tokens-per-s", type=float, default=13_900, help="of 7b in training")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth, step_ms, adamw_ms = copy_tbps(device), STEP_TOKENS / arguments.tokens_per_s * 1e3, float("nan")
    print(f"{where(device)}; a large copy: {bandwidth:.2f} TB/s; a step of {STEP_TOKENS:,} tokens: {step_ms:,.0f} ms")
    print(f"{'update':46} {'bytes':>5} {'ms':>8} {'floor ms':>9} {'of floor':>9} {'ms for 7b':>10} {'of step':>8}")
    for number, (name, case, moved) in enumerate(CASES):
        if number and arguments.only not in name.lower():
            continue
        model = layers(arguments.layers, device, torch.float32 if case == "Muon" else torch.bfloat16)
        params, is_muon = list(model.parameters()), "muon" in name.lower()
        numel = sum(p.numel() for p in params)
        try:
            if isinstance(case, dict):
                optimizer: Any = Optimizer(model, OptimizerConfig(**case))
            elif case == "Muon":
                optimizer = [torch.optim.Muon(params, lr=1e-4, adjust_lr_fn="match_rms_adamw")]
            else:
                optimizer = [torch.optim.AdamW(params, lr=1e-4, fused=True)]
        except TrainingError as error:
            print(f"{name:46} {error}")
            continue
        took, floor = update_ms(optimizer, device), moved * numel / bandwidth / 1e9
        adamw_ms = took / numel if number == 0 else adamw_ms
        full_ms = took / numel * LAYERS_NUMEL + REST_NUMEL * (adamw_ms if is_muon else took / numel)
        flops = f"  {sum(n_flops(p.shape) for p in params) / took / 1e9:.0f} TFLOP/s" if is_muon else ""
        print(
            f"{name:46} {moved:5} {took:8.2f} {floor:9.2f} {floor / took:9.1%} {full_ms:10.1f} {full_ms / step_ms:8.2%}"
            f"{flops}",
            flush=True,
        )
        del model, params, optimizer
        gc.collect()


if __name__ == "__main__":
    main()
