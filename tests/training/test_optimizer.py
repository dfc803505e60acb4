"""AdamW against torch.optim's."""

import pytest
import torch
from torch import nn

from training.config import Decay, OptimizerConfig
from training.optimizer import AdamW


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)).to(dtype)


def reference_for(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim >= 2 or config.decay is Decay.all]
    rest = [p for p in model.parameters() if p.ndim < 2 and config.decay is not Decay.all]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        foreach=False,
    )


@pytest.mark.parametrize("decay", list(Decay))
def test_twenty_updates_equal_torchs_adamw(decay: Decay) -> None:
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1, decay=decay)
    ours, theirs = network(), network()
    optimizer, reference = AdamW(ours, config), reference_for(theirs, config)
    for step in range(20):
        lr, beta2 = 1e-2 / (step + 1), 0.95 + step / 1000
        for group in reference.param_groups:
            group["lr"], group["betas"] = lr, (config.beta1, beta2)
        x = torch.randn(5, 8)
        for model in (ours, theirs):
            model(x).square().sum().backward()
        reference.step()
        reference.zero_grad()
        optimizer.step(lr=lr, beta2=beta2, grad_scale=torch.tensor(1.0))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_gradients_are_divided_by_the_scale_and_dropped() -> None:
    config = OptimizerConfig(eps=1.0)  # a large eps makes the update depend on the gradient's size
    one, other = network(), network()
    first, second = AdamW(one, config), AdamW(other, config)
    for model, optimizer, factor in ((one, first, 1.0), (other, second, 512.0)):
        for param in model.parameters():
            param.grad = torch.full_like(param, 0.25) * factor
        optimizer.step(lr=0.1, beta2=0.95, grad_scale=torch.tensor(factor))
        assert all(param.grad is None for param in model.parameters())
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_bf16_weights_follow_fp32_masters_that_keep_small_updates() -> None:
    config = OptimizerConfig(weight_decay=0.0)
    low, full = network(torch.bfloat16), network(torch.bfloat16).float()
    optimizer, reference = AdamW(low, config), reference_for(full, config)
    start = next(low.parameters()).detach().clone()
    for _ in range(50):  # 50 updates of 1e-5, each far below a bf16 step of these weights
        for param, other in zip(low.parameters(), full.parameters(), strict=True):
            param.grad = torch.ones_like(param)
            other.grad = torch.ones_like(other)
        for group in reference.param_groups:
            group["lr"] = 1e-5
        reference.step()
        optimizer.step(lr=1e-5, beta2=config.beta2, grad_scale=torch.tensor(1.0))
    for (name, param), other in zip(low.named_parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(optimizer.masters[name], other.detach(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(param.detach(), other.detach().bfloat16(), rtol=0, atol=0)
    assert not torch.equal(next(low.parameters()), start)


def test_only_matrices_decay_unless_all_do() -> None:
    model = network()
    decayed = {
        d: [n for n in dict(model.named_parameters()) if AdamW(model, OptimizerConfig(decay=d)).decayed(n)]
        for d in Decay
    }
    assert decayed[Decay.matrices] == ["0.weight", "2.weight"]
    assert decayed[Decay.all] == [name for name, _ in model.named_parameters()]


def test_everything_to_keep_is_in_the_tensors() -> None:
    model = network(torch.bfloat16)
    optimizer = AdamW(model, OptimizerConfig())
    kept = optimizer.tensors()
    assert len(kept) == 4 * len(list(model.parameters()))
    assert all(tensor.dtype == torch.float32 for tensor in kept.values())
    kept["model.0.weight"].fill_(3.0)
    optimizer.refresh()
    assert (model[0].weight == 3).all()  # type: ignore[index, union-attr]
