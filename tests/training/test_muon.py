"""Muon against torch.optim.Muon, closed forms, and the singular values that it promises."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from parallel.shards import ParamShard, local, whole_params
from parallel.whole_matrices import balance
from training.config import Dtype, MuonScale, OptimizerConfig
from training.optim import muon
from training.optim.master_weights import MasterWeights, read
from training.optim.muon import Muon, add_gradient, apply_update
from training.optim.optimizer import Optimizer

SHAPES = [(24, 16), (16, 24), (16, 24), (8, 8), (1, 5), (5, 1), (1, 1)]


class Model(nn.Module):
    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        layers = {f"w{i}": nn.Linear(columns, rows) for i, (rows, columns) in enumerate(shapes)}
        self.blocks = nn.ModuleDict({"0": nn.ModuleDict(layers)})


def hidden(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "blocks" in name and p.ndim == 2}


def built(model: nn.Module, params: dict[str, ParamShard] | None = None, **options: Any) -> Optimizer:
    optimizer = Optimizer(model, OptimizerConfig(name="muon", **options), params=params)
    optimizer.set_schedule([(1e-2, 0.9)] * 20)
    return optimizer


def update(optimizer: Optimizer, grads: dict[str, Tensor], *, finite: bool = True) -> None:
    for name, param in optimizer.params.items():
        param.shard.grad = grads[name].clone().to(param.shard.dtype) * 4
    optimizer.step(grad_scale=torch.tensor(4.0), finite=torch.tensor(finite))


def random_grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn_like(param, dtype=torch.float32) for name, param in model.named_parameters()}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("scale", [MuonScale.match_rms_adamw, MuonScale.original])
def test_equals_torch_muon_and_adamw(scale: MuonScale, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both iterate in fp32, because processors round batched products in bf16 in different orders.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    torch.manual_seed(0)
    ours = Model(SHAPES)
    theirs = copy.deepcopy(ours)
    optimizer = built(ours, scale=scale, weight_decay=0.1, eps=1e-4, beta2=0.9)
    assert isinstance(optimizer.rules[0], Muon)
    rest = [param for name, param in theirs.named_parameters() if name not in hidden(theirs)]
    matrices, biases = [p for p in rest if p.ndim == 2], [p for p in rest if p.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": biases, "weight_decay": 0.0}]
    references = [
        torch.optim.Muon(hidden(theirs).values(), lr=1e-2, weight_decay=0.1, adjust_lr_fn=scale.value),
        torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.9), eps=1e-4),
    ]
    for _ in range(10):
        grads = random_grads(ours)
        for name, param in theirs.named_parameters():
            param.grad = grads[name]
        for reference in references:
            reference.step()
        update(optimizer, grads)
        for (name, mine), its in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=1e-6, msg=name)


def test_master_weights_are_exact() -> None:
    torch.manual_seed(0)
    low = Model(SHAPES).bfloat16()
    full = copy.deepcopy(low).float()
    optimizers = [built(model, normuon=True, cautious_decay=True) for model in (low, full)]
    for _ in range(5):
        grads = {name: grad.bfloat16().float() for name, grad in random_grads(full).items()}
        for optimizer in optimizers:
            update(optimizer, grads)
    kept, whole = (optimizer.state_tensors() for optimizer in optimizers)
    assert kept.keys() == whole.keys()
    for name in kept:
        assert torch.equal(kept[name], whole[name]), name


def test_state_is_one_momentum_and_a_number_per_row() -> None:
    tensors = built(Model([(6, 4)]), normuon=True).state_tensors()
    state = {name.rpartition(".")[2]: tensor.shape for name, tensor in tensors.items() if "w0.weight" in name}
    assert state == {"weight": (6, 4), "momentum": (6, 4), "row_square": (6, 1), "step": ()}
    names = built(Model([(6, 4)])).state_tensors()
    assert {name.rpartition(".")[2] for name in names if "w0.bias" in name} == {"bias", "exp_avg", "exp_avg_sq", "step"}


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 2**31), polar_express=st.booleans())
def test_singular_values_become_about_one(rows: int, columns: int, seed: int, polar_express: bool) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    (found,) = muon.orthogonalize([matrix], polar_express=polar_express)
    assert found.shape == matrix.shape
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    inner = (u.mT @ found.double() @ v.mT).diagonal()
    kept = s > 0.02 * torch.linalg.vector_norm(s)  # five steps do not reach smaller ones
    low, high = (0.85, 1.15) if polar_express else (0.6, 1.25)
    assert ((inner[kept] > low) & (inner < high)[kept]).all()
    off = found.double() - u @ torch.diag(inner) @ v
    assert off.norm() <= 1e-3 * found.norm() + 1e-6, "singular vectors stay"


def test_normuon_evens_out_rows_and_keeps_the_norm() -> None:
    torch.manual_seed(0)
    model = Model([(6, 16)])
    name, param = next(iter(hidden(model).items()))
    before, grads = param.detach().clone(), random_grads(model)
    optimizer = built(model, weight_decay=0.0, scale=MuonScale.original, normuon=True)
    update(optimizer, grads)
    plain = muon.orthogonalize([grads[name]])[0]
    change = (before - param.detach()) / 1e-2
    assert change.norm() == pytest.approx(float(plain.norm()), rel=1e-4)
    rows = change.norm(dim=1)
    assert float(rows.max() / rows.min()) == pytest.approx(1, abs=1e-3) and plain.norm(dim=1).std() > 1e-3
    square = optimizer.state_tensors()[f"optimizer.{name}.row_square"]
    torch.testing.assert_close(square, 0.1 * plain.square().mean(dim=1, keepdim=True), rtol=1e-3, atol=0)


def test_cautious_decay_spares_what_the_update_grows() -> None:
    torch.manual_seed(0)
    start, after = Model([(8, 8)]), list[Tensor]()
    grads, before = random_grads(start), next(iter(hidden(start).values())).detach()
    for decay, cautious_decay in ((0.0, False), (0.5, False), (0.5, True)):
        model = copy.deepcopy(start)
        update(built(model, weight_decay=decay, cautious_decay=cautious_decay), grads)
        after.append(next(iter(hidden(model).values())).detach())
    none, full, cautious = after
    shrinks = (before - none) * before > 0
    assert shrinks.any() and not shrinks.all()
    torch.testing.assert_close(cautious, torch.where(shrinks, full, none))


def test_nonfinite_step_changes_nothing() -> None:
    torch.manual_seed(0)
    model = Model(SHAPES)
    optimizer = built(model, normuon=True)
    update(optimizer, random_grads(model))
    before = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    grads = random_grads(model)
    for grad in grads.values():
        grad.view(-1)[0] = float("nan")
    update(optimizer, grads, finite=False)
    for name, tensor in optimizer.state_tensors().items():
        assert torch.equal(tensor, before[name]), name


def test_states_of_16_bits_are_exchanged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    alone = Model([(6, 16), (8, 8)])
    sharded, grads = copy.deepcopy(alone), random_grads(alone)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        params = whole_params(sharded)
        for name, param in hidden(sharded).items():
            params[name] = ParamShard(param, param.shape, mesh, (Shard(0),))
        pairs = ((alone, None), (sharded, params))
        one, other = (built(model, its, normuon=True, state_dtype=Dtype.bf16) for model, its in pairs)
        for optimizer in (one, other) * 2:
            update(optimizer, grads)
        expected = one.state_tensors()
        for name, tensor in other.state_tensors().items():
            assert torch.equal(local(tensor), expected[name]), name
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("scale", "factor"), [("match_rms_adamw", 0.8), ("spectral", 0.5), ("original", 1.0)])
def test_scales(scale: str, factor: float) -> None:
    assert muon.scale_of((4, 16), MuonScale(scale)) == factor


@given(costs=st.lists(st.integers(0, 100), min_size=1, max_size=30), n_ranks=st.integers(1, 9))
def test_owners_are_balanced(costs: list[int], n_ranks: int) -> None:
    owners, largest = balance(costs, n_ranks)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(n_ranks)]
    assert largest == max(loads) <= sum(costs) / n_ranks + max(costs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_update_equals_the_plain_one(dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    for shape in ((96, 64), (64, 160), (1, 32), (64, 1)):
        param, grad = (torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(2))
        weights = MasterWeights({"w": ParamShard(param, param.shape)})
        momentum, finite = torch.zeros(shape, device="cuda"), torch.ones((), device="cuda", dtype=torch.bool)
        scalars = finite.float() * 4, finite, (0.05 * finite).float()
        found = []
        for compiled in (False, True):
            copies = [weights.shards["w"].clone(), weights.remainder.get("w"), momentum.clone()]
            rest = copies[1] if copies[1] is None else copies[1].clone()
            add: Any = torch.compile(add_gradient) if compiled else add_gradient
            apply: Any = torch.compile(apply_update) if compiled else apply_update
            for _ in range(3):
                update = add(copies[2], grad, *scalars, 0.95, torch.bfloat16)
                apply(copies[0], rest, update, 0.02 * finite.double(), 0.1 * finite.double(), False)
            found.append((read(copies[0], rest), copies[2], update))
        for plain, other in zip(*found, strict=True):
            torch.testing.assert_close(other, plain, rtol=1e-2, atol=1e-3)


def test_settings_of_muon_are_refused_with_adamw() -> None:
    (problem,) = OptimizerConfig(name="adamw", normuon=True).problems()
    assert "optimizer.normuon" in problem
    assert not list(OptimizerConfig(name="muon", normuon=True, scale=MuonScale.spectral).problems())
