"""AdamW against torch.optim's."""

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training.config import Decay, Dtype, OptimizerConfig, OptimizerImpl, TrainingError
from training.optim.adamw import AdamW, resolve_impl
from training.optim.master_weights import join, split
from training.optim.optimizer import Optimizer

ONE, FINITE = torch.tensor(1.0), torch.tensor(True)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)).to(dtype)


def reference_for(model: nn.Module, config: OptimizerConfig, *, fused: bool = False) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim >= 2 or config.decay is Decay.all]
    rest = [p for p in model.parameters() if p.ndim < 2 and config.decay is not Decay.all]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, config.lr, (config.beta1, config.beta2), config.eps, config.weight_decay, foreach=False, fused=fused
    )


def train_both(optimizer: Optimizer, reference: torch.optim.AdamW, full: nn.Module, lr: float, n_steps: int) -> None:
    """Make the same updates of an optimizer's parameters and of their fp32 reference, with falling rates."""
    rates = [(lr / (step + 1), 0.95 + step / 1000) for step in range(n_steps)]
    optimizer.set_schedule(rates)
    for lr, beta2 in rates:
        for group in reference.param_groups:
            group["lr"], group["betas"] = lr, (optimizer.config.beta1, beta2)
        scale = torch.rand((), device=optimizer.device) + 1
        for param, other in zip(optimizer.params.values(), full.parameters(), strict=True):
            param.shard.grad = torch.randn_like(param.shard)
            other.grad = param.shard.grad.float() / scale
        reference.step()
        finite = FINITE.to(optimizer.device)
        assert optimizer.step(grad_scale=scale, finite=finite).tolist() == [lr, beta2]
        assert all(param.grad is None for param in optimizer.params.values())


@pytest.mark.parametrize("decay", list(Decay))
def test_updates_equal_torch_adamw(decay: Decay) -> None:
    config = OptimizerConfig(weight_decay=0.1, decay=decay, eps=1.0)  # so that the size of gradients matters
    ours, theirs = network(), network()
    train_both(Optimizer(ours, config), reference_for(theirs, config), theirs, lr=1e-2, n_steps=20)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_nonfinite_update_changes_nothing_and_takes_no_rate(device: str) -> None:
    """Case 41."""
    model = network(torch.bfloat16).to(device)
    optimizer = Optimizer(model, OptimizerConfig())
    assert optimizer.rules[0].on_device is (device == "cuda")
    optimizer.set_schedule([(0.1, 0.95), (0.2, 0.96)])
    before = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    rates = []
    for finite in (False, True):
        for param in model.parameters():
            param.grad = torch.full_like(param, torch.nan if not finite else 0.5)
        rates.append(optimizer.step(grad_scale=ONE.to(device), finite=torch.tensor(finite, device=device)).tolist())
        same = all(torch.equal(tensor, before[name]) for name, tensor in optimizer.state_tensors().items())
        assert same is not finite
    assert rates == [[0.1, 0.95], [0.1, 0.95]]


def test_a_master_splits_into_the_nearest_bf16_and_the_rest() -> None:
    bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=torch.Generator().manual_seed(0)).int()
    ties = (torch.arange(-(1 << 15), 1 << 15).int() << 16) + 0x8000  # halfway between two bf16
    masters = torch.cat([bits, ties, ties - 1, ties + 1]).view(torch.float32)
    masters = masters[masters.isfinite()]
    upper, lower = split(masters)
    assert torch.equal(join(upper, lower).view(torch.int32), masters.view(torch.int32))
    # torch rounds a tie to even, this away from 0: both are as near
    finite = masters.bfloat16().isfinite() & upper.isfinite()
    exact, ours, theirs = (x[finite].double() for x in (masters, upper, masters.bfloat16()))
    assert torch.equal((ours - exact).abs(), (theirs - exact).abs())
    assert (ours.abs() >= theirs.abs())[(ours != theirs)].all()


@pytest.mark.parametrize("state_dtype", [Dtype.fp32, Dtype.bf16])
def test_bf16_weights_follow_fp32_masters_exactly(state_dtype: Dtype) -> None:
    config = OptimizerConfig(lr=1e-5, weight_decay=0.1, decay=Decay.all, state_dtype=state_dtype)
    low, full = network(torch.bfloat16), network(torch.bfloat16).float()
    optimizer, reference = Optimizer(low, config), reference_for(full, config, fused=True)
    start = next(low.parameters()).detach().clone()
    optimizer.set_schedule([(1e-5, config.beta2)] * 50)
    for _ in range(50):  # 50 updates of 1e-5, each far below a bf16 step of these weights
        for param, other in zip(low.parameters(), full.parameters(), strict=True):
            param.grad = torch.randn_like(param) + 1
            other.grad = param.grad.float()
        reference.step()
        optimizer.step(grad_scale=ONE, finite=FINITE)
    kept = optimizer.state_tensors()
    for (name, param), other in zip(low.named_parameters(), full.parameters(), strict=True):
        master = kept[f"model.{name}"]
        if state_dtype is Dtype.fp32:
            assert torch.equal(master, other.detach())
            assert torch.equal(kept[f"optimizer.{name}.exp_avg_sq"], reference.state[other]["exp_avg_sq"])
        else:
            torch.testing.assert_close(master, other.detach(), rtol=0, atol=2e-5)
        assert torch.equal(param.detach(), split(master)[0])
    assert not torch.equal(next(low.parameters()), start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_dtype", [Dtype.fp32, Dtype.bf16])
def test_state_tensors_round_trip(dtype: torch.dtype, state_dtype: Dtype) -> None:
    model = network(dtype)
    optimizer = Optimizer(model, OptimizerConfig(state_dtype=state_dtype))
    kept = optimizer.state_tensors()
    assert len(kept) == 4 * len(list(model.parameters()))
    assert all(tensor.dtype == torch.float32 for tensor in kept.values())
    kept["model.0.weight"].fill_(3.001)
    kept["optimizer.0.weight.exp_avg"].fill_(0.5)
    optimizer.load_tensors(kept)
    assert torch.equal(model[0].weight, torch.full((16, 8), 3.001).to(dtype))  # type: ignore[index, union-attr]
    again = optimizer.state_tensors()
    assert all(torch.equal(again[name], kept[name]) for name in kept)


def test_a_missing_implementation_is_refused() -> None:
    cpu = torch.device("cpu")
    assert resolve_impl(OptimizerImpl.auto, cpu) is OptimizerImpl.torch
    for asked in (OptimizerImpl.triton, OptimizerImpl.apex):
        with pytest.raises(TrainingError, match=rf"optimizer.impl \({asked.value}\) needs a CUDA device"):
            Optimizer(network(), OptimizerConfig(impl=asked))


def multi_tensor_adam(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], lr: float, beta1: float, beta2: float,
    epsilon: float, step: int, mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """What NVIDIA apex's function of this name does with these arguments, in the same order."""
    assert chunk_size == 2048 * 32 and noop_flag.dtype == torch.int32 and noop_flag.tolist() == [0]
    assert isinstance(step, int) and bias_correction == 1 and mode == 1  # decoupled weight decay
    assert len({tensor.dtype for tensors in tensor_lists for tensor in tensors}) == 1  # it asks the first one only
    for grad, param, exp_avg, exp_avg_sq in zip(*tensor_lists, strict=True):
        assert all(tensor.is_contiguous() for tensor in (grad, param, exp_avg, exp_avg_sq))
        exp_avg.mul_(beta1).add_((1 - beta1) * grad)
        exp_avg_sq.mul_(beta2).add_((1 - beta2) * grad * grad)
        update = (exp_avg / (1 - beta1**step)) / ((exp_avg_sq / (1 - beta2**step)).sqrt() + epsilon)
        param.sub_(lr * (update + weight_decay * param))


def stand_in_for_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put modules where NVIDIA apex has its own; theirs needs a CUDA build."""

    def multi_tensor_applier(op: Any, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], *args: Any) -> None:
        op(2048 * 32, noop_flag, tensor_lists, *args)

    functions = {"amp_C": multi_tensor_adam, "apex": None, "apex.multi_tensor_apply": multi_tensor_applier}
    for name, function in functions.items():
        module = ModuleType(name)
        if function is not None:
            setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apex_arguments_make_it_torch_adamw(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    stand_in_for_apex(monkeypatch)
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1)
    low, full = network(dtype), network(dtype).float()
    optimizer, reference = Optimizer(low, config), reference_for(full, config)
    assert isinstance(optimizer.rules[0], AdamW)
    optimizer.rules[0].impl = OptimizerImpl.apex
    train_both(optimizer, reference, full, lr=1e-2, n_steps=5)
    kept = optimizer.state_tensors()
    for name, other in full.named_parameters():
        torch.testing.assert_close(kept[f"model.{name}"], other.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta1", [0.9, 0.3])
def test_kernel_equals_torch_adamw_exactly(dtype: torch.dtype, beta1: float) -> None:
    config = OptimizerConfig(weight_decay=0.1, decay=Decay.all, beta1=beta1, impl=OptimizerImpl.triton)
    torch.manual_seed(0)
    low = nn.Linear(333, 4099, dtype=dtype, device="cuda")
    full = nn.Linear(333, 4099, device="cuda")
    full.load_state_dict({name: p.float() for name, p in low.state_dict().items()})
    optimizer, reference = Optimizer(low, config), reference_for(full, config)
    train_both(optimizer, reference, full, lr=1e-3, n_steps=30)
    kept = optimizer.state_tensors()
    for (name, param), other in zip(low.named_parameters(), full.named_parameters(), strict=True):
        state: dict[str, Tensor] = reference.state[other[1]]
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(kept[f"optimizer.{name}.{moment}"], state[moment]), moment
        assert torch.equal(kept[f"model.{name}"].cpu(), other[1].detach().cpu())
        rounded = split(other[1].detach())[0] if dtype == torch.bfloat16 else other[1].detach().to(dtype)
        assert torch.equal(param.detach(), rounded)


def test_a_tied_copy_is_saved_once_and_loaded_into_both() -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(6, 4), "head": torch.nn.Linear(4, 6, bias=False)})
    model.tied_params = {"head.weight": "embed.weight"}  # type: ignore[assignment]
    optimizer = Optimizer(model, OptimizerConfig())
    tensors = optimizer.state_tensors()
    assert {name for name in tensors if name.startswith("model.")} == {"model.embed.weight"}
    for tensor in tensors.values():
        tensor.fill_(0.5)
    optimizer.load_tensors(tensors)
    for name in ("embed.weight", "head.weight"):
        assert (model.get_parameter(name) == 0.5).all() and (optimizer.state["exp_avg_sq"][name] == 0.5).all(), name
