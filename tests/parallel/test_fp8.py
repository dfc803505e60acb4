"""8-bit products against exact ones."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.transformer import Transformer
from parallel.config import ActivationCheckpointing, ParallelConfig
from parallel.fp8 import E4M3, E5M2, Fp8Linear, Fp8RowwiseLinear, to_fp8_both_ways
from parallel.mesh import Mesh
from parallel.parallelize import apply_fp8, compile_blocks, parallelize
from tests.models import small_model
from tests.parallel.layouts import Case, build, run, steps_of, whole


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_product_and_gradients_have_8_bit_precision(device: str) -> None:
    torch.manual_seed(0)
    exact = nn.Linear(96, 64).to(device)
    linear = nn.Linear(96, 64, dtype=torch.bfloat16, device=device)
    linear.load_state_dict(exact.state_dict())
    linear.__class__ = Fp8Linear
    x = torch.randn(2, 32, 96, device=device)
    x[0, 0, 0] = 50.0  # an outlier sets the scale
    grad = torch.randn(2, 32, 64, device=device) * 1e-5  # far below what 8 bits hold unscaled
    inputs = [x.clone().requires_grad_(), x.bfloat16().requires_grad_()]
    outs = [exact(inputs[0]), linear(inputs[1])]
    grads = [
        torch.autograd.grad(out, (i, m.weight, m.bias), grad.to(out.dtype))
        for out, i, m in zip(outs, inputs, (exact, linear), strict=True)
    ]
    assert outs[1].dtype == torch.bfloat16 and 1e-3 < relative(outs[1].detach(), outs[0].detach()) < 0.05
    for found, other, limit in zip(grads[1], grads[0], (0.1, 0.1, 0.01), strict=True):
        assert found.dtype == torch.bfloat16 and relative(found, other) < limit


def test_odd_number_of_tokens_is_padded() -> None:
    linear = nn.Linear(32, 16, dtype=torch.bfloat16)
    linear.__class__ = Fp8Linear
    found = []
    for n_tokens in (15, 16):
        x = torch.ones(3, 5, 32, dtype=torch.bfloat16).cumsum(-1).flatten(0, 1)
        x = torch.cat([x, x.new_zeros(n_tokens - 15, 32)]).requires_grad_()
        out = linear(x)
        assert out.shape == (n_tokens, 16)
        found.append((out[:15], *torch.autograd.grad(out[:15].square().sum(), (x, linear.weight))))
    for part, more in zip(*found, strict=True):
        assert torch.equal(part, more[: len(part)])


# Dynamo's own, from inspecting what it compiles
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_product_compiles_to_one_graph() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 16, dtype=torch.bfloat16)
    layer.__class__ = Fp8Linear
    x = torch.randn(2, 16, 32, dtype=torch.bfloat16, requires_grad=True)
    grads = []
    for forward in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        grads.append(torch.autograd.grad(forward(x).square().sum(), (x, *layer.parameters())))
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=2e-2, atol=1e-2)


WIDE = small_model(d_model=64, n_layers=1, n_kv_heads=4, d_ff=96, attention_bias=True)


def one_block(dtype: torch.dtype) -> Transformer:
    """Return a layer whose output depends much on each product and each bias."""
    model = Transformer(WIDE)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for param in model.parameters():
        param.data.normal_(0, param.shape[-1] ** -0.5 if param.ndim > 1 else 1, generator=generator)
    return model.to(dtype)


def passes(model: Transformer, n_ranks: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """Return output and gradients; each of `n_ranks` computes the whole loss."""
    tokens_BT = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(2))
    tokens_BT = tokens_BT.to(next(model.parameters()).device)
    (model(tokens_BT, head=lambda h_BTD, _: h_BTD).square().sum() / n_ranks).backward()
    with torch.no_grad():
        out = model(tokens_BT, head=lambda h_BTD, _: h_BTD)
    return out, {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def gradients(case: Case, mesh: Mesh, config: ParallelConfig) -> dict[str, Tensor]:
    """Return the gradients of a step of a model that depends much on each product and each bias."""
    with mock.patch("parallel.parallelize.check_fp8_device"):
        engine = build(case, mesh, config)
    generator = torch.Generator().manual_seed(1)
    for param in engine.params.values():
        scale = param.shape[-1] ** -0.5 if param.ndim > 1 else 1
        param.write(torch.randn(param.shape, generator=generator) * scale)
    found: dict[str, Tensor] = {}

    def step(**_: Tensor) -> Tensor:
        params: dict[str, Any] = engine.params
        found.update({name: whole(param.laid_out(param.grad)) for name, param in params.items()})
        return torch.zeros(2)

    engine.optimizer.step = step  # type: ignore[method-assign]
    engine.train_step(steps_of(case.n_micro_batches)[0][mesh.dp_rank :: mesh.dp_size])
    return found


fp8 = partial(Case, 2, "wide", n_micro_batches=2, dtype=torch.bfloat16, fp8="tensorwise")
ZERO = {
    "zero1": fp8(layout={"dp_shard": 2, "zero_stage": 1}),
    "zero3_recomputed": fp8(
        layout={"dp_shard": 2, "zero_stage": 3, "activation_checkpointing": ActivationCheckpointing.full}
    ),
}


@pytest.mark.slow
def test_gradients_under_zero_are_those_of_one_rank_but_for_the_sum(tmp_path: Path) -> None:
    here = run(tmp_path, ZERO, 2, function=gradients)
    alone = gradients(fp8(), Mesh(device=torch.device("cpu")), ParallelConfig())
    for layout, found in here.items():
        assert isinstance(found, dict), found
        assert found.keys() == alone.keys()
        for name, grad in alone.items():  # one rank adds its micro-batches in bf16
            assert relative(found[name], grad) < 1e-2, (layout, name)


def muon_step(case: Case, mesh: Mesh, config: ParallelConfig, given: Any = None) -> Any:
    """Train a step of Muon; return its gradients and their scale, or use those given, and the optimizer's tensors."""
    with mock.patch("parallel.parallelize.check_fp8_device"):
        engine = build(case, mesh, config)
    params: dict[str, Any] = engine.params
    update, found = engine.optimizer.step, given

    def step(*, grad_scale: Tensor, **others: Any) -> Tensor:
        nonlocal found
        found = given or ({name: whole(param.laid_out(param.grad)) for name, param in params.items()}, grad_scale)
        for name, grad in (given or ({}, None))[0].items():
            params[name].shard.grad.copy_(params[name].take(grad))
        return update(grad_scale=found[1], **others)

    engine.optimizer.step = step  # type: ignore[method-assign]
    engine.train_step(steps_of(case.n_micro_batches)[0][mesh.dp_rank :: mesh.dp_size])
    return found, {name: whole(tensor) for name, tensor in engine.optimizer.state_tensors().items()}


@pytest.mark.slow
def test_muon_updates_like_one_rank_from_the_gradients_of_8_bit_products(tmp_path: Path) -> None:
    layouts = {**ZERO, "tp": fp8(layout={"tp": 2})}
    cases = {name: replace(case, optimizer="muon") for name, case in layouts.items()}
    for layout, found in run(tmp_path, cases, 2, function=muon_step).items():
        assert isinstance(found, tuple), found
        given, tensors = found
        _, alone = muon_step(fp8(optimizer="muon"), Mesh(device=torch.device("cpu")), ParallelConfig(), given)
        assert tensors.keys() == alone.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-5, atol=1e-7, msg=f"{layout}, {name}")


def tp_passes(case: Case, mesh: Mesh, config: ParallelConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the same as `passes` of `one_block`, divided over tp, from whole tensors."""
    with mock.patch("parallel.parallelize.check_fp8_device"):
        model = parallelize(Transformer.on_meta(WIDE), mesh, config, case.dtype, fp8=case.fp8)
    assert sum(isinstance(module, (Fp8Linear, Fp8RowwiseLinear)) for module in model.module.modules()) == 7
    for name, param in one_block(torch.float32).named_parameters():
        model.params[name].write(param.detach())
    out, grads = passes(model.module, mesh.axes.tp)
    for name in model.partial_grads & grads.keys():
        dist.all_reduce(grads[name])
    outs = mesh.gather(out)
    assert all(torch.equal(out, other) for other in outs)
    return out, {name: whole(model.params[name].laid_out(grad)) for name, grad in grads.items()}


@pytest.mark.slow
def test_tp_equals_one_rank_and_adds_the_bias_once(tmp_path: Path) -> None:
    layouts = {"tp": fp8(layout={"tp": 2}), "tp_no_sp": fp8(layout={"tp": 2, "sequence_parallel": False})}
    exact_out, exact_grads = passes(one_block(torch.float32))
    single = one_block(torch.bfloat16)
    apply_fp8(list(single.blocks.children()), "tensorwise")
    whole_out, whole_grads = passes(single)
    for layout, found in run(tmp_path, layouts, 2, function=tp_passes).items():
        assert isinstance(found, tuple), found
        out, grads = found
        assert 1e-3 < relative(out, exact_out) < 1.2 * relative(whole_out, exact_out) < 0.1
        assert grads.keys() == exact_grads.keys()
        for name, exact in exact_grads.items():
            assert relative(grads[name], exact) < 1.2 * relative(whole_grads[name], exact) < 0.2, (layout, name)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_rowwise_scales_have_8_bit_precision_on_gpu(compiled: bool) -> None:
    pytest.importorskip("torchao")
    exact_out, exact_grads = passes(one_block(torch.float32).cuda())
    model = one_block(torch.bfloat16).cuda()
    blocks = list(model.blocks.children())
    apply_fp8(blocks, "rowwise")
    assert sum(type(module).__name__ == "Float8Linear" for module in model.modules()) == 7
    if compiled:
        compile_blocks(blocks)
    out, grads = passes(model)
    assert 1e-3 < relative(out, exact_out) < 0.1
    assert grads.keys() == exact_grads.keys()
    for name, exact in exact_grads.items():
        assert grads[name].dtype == torch.bfloat16 and relative(grads[name], exact) < 0.2, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_kernel_casts_like_torch_and_transposes(dtype: torch.dtype) -> None:
    x = torch.randn(1000, 333, device="cuda", dtype=torch.bfloat16)
    scale = torch.finfo(dtype).max / x.abs().amax().float()
    cast, transposed = to_fp8_both_ways(x, scale, dtype)
    assert torch.equal(cast.float(), (x.float() * scale).to(dtype).float())
    assert transposed.is_contiguous() and torch.equal(transposed.float(), cast.float().T)
