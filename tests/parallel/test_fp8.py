"""8-bit products against exact ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

from model.config import Init, ModelConfig
from model.transformer import Transformer
from parallel.fp8 import E4M3, E5M2, Fp8Linear, GatheredWeight, to_fp8_both_ways
from parallel.parallelize import apply_fp8, compile_blocks
from parallel.tensor_parallel import apply_tp


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


ON_DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@ON_DEVICES
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
    for part, whole in zip(*found, strict=True):
        assert torch.equal(part, whole[: len(part)])


def gathered(linear: nn.Linear) -> nn.Linear:
    """Return the same layer with the weight that FSDP would gather."""
    weight_MK = linear.weight.detach()
    amax = weight_MK.abs().amax().float()
    in_8_bits = to_fp8_both_ways(weight_MK, torch.finfo(E4M3).max / amax, E4M3)[0]
    other = nn.Linear(linear.in_features, linear.out_features, dtype=weight_MK.dtype, device=weight_MK.device)
    other.bias = linear.bias
    other.weight = nn.Parameter(GatheredWeight(in_8_bits, amax, weight_MK.dtype))
    other.__class__ = Fp8Linear
    return other


@ON_DEVICES
def test_gathered_weight_equals_one_that_is_cast_now(device: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 64, dtype=torch.bfloat16, device=device)
    linear.__class__ = Fp8Linear
    x = torch.randn(2, 32, 96, dtype=torch.bfloat16, device=device, requires_grad=True)
    found = []
    for layer in (linear, gathered(linear)):
        out = layer(x)
        found.append((out, *torch.autograd.grad(out.square().sum(), (x, layer.weight))))
    assert all(torch.equal(part, other) for part, other in zip(*found, strict=True))
    assert type(found[1][2]) is Tensor and found[1][2].dtype == torch.bfloat16


def test_gathered_weight_allows_only_views_and_products() -> None:
    weight = gathered(nn.Linear(32, 16)).weight
    assert isinstance(weight.view(-1), GatheredWeight)
    with pytest.raises(NotImplementedError, match="mul.Tensor"):
        weight.mul(2)


# Dynamo's own, from inspecting the inputs of what it compiles
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf", "ignore:.*should not be instantiated"
)
@pytest.mark.parametrize("prepare", [nn.Module.train, gathered])
def test_product_compiles_to_one_graph(prepare: Callable[[Any], nn.Module]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 16, dtype=torch.bfloat16)
    linear.__class__ = Fp8Linear
    layer = prepare(linear)
    x = torch.randn(2, 16, 32, dtype=torch.bfloat16, requires_grad=True)
    grads = []
    for forward in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        grads.append(torch.autograd.grad(forward(x).square().sum(), (x, *layer.parameters())))
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=2e-2, atol=1e-2)


WIDE = ModelConfig(
    name="wide", vocab_size=64, d_model=64, n_layers=1, n_heads=4, n_kv_heads=4, d_ff=96, max_seq_len=32,
    init=Init.llama, attention_bias=True,
)  # fmt: skip


def one_block(dtype: torch.dtype) -> Transformer:
    """Return a layer whose output depends much on each product and each bias."""
    model = Transformer(WIDE)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for param in model.parameters():
        param.data.normal_(0, param.shape[-1] ** -0.5 if param.ndim > 1 else 1, generator=generator)
    return model.to(dtype)


def passes(model: Transformer) -> tuple[Tensor, dict[str, Tensor]]:
    tokens_BT = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(2))
    tokens_BT = tokens_BT.to(next(model.parameters()).device)
    model(tokens_BT, head=lambda h_BTD, _: whole(h_BTD)).square().sum().backward()
    with torch.no_grad():
        out = model(tokens_BT, head=lambda h_BTD, _: whole(h_BTD))
    return out, {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def tp_rank(rank: int, folder: Path, sequence_parallel: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = one_block(torch.bfloat16)
    apply_tp(model, init_device_mesh("cpu", (2,)), sequence_parallel=sequence_parallel)
    apply_fp8(list(model.blocks.children()), "tensorwise")
    assert sum(isinstance(module, Fp8Linear) for module in model.modules()) == 7
    found = passes(model)
    torch.save(found, folder / f"found{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_tp_equals_one_rank_and_adds_the_bias_once(tmp_path: Path, sequence_parallel: bool) -> None:
    ranks: Any = spawn(tp_rank, (tmp_path, sequence_parallel), nprocs=2, join=False)
    for process in ranks.processes:  # not their exit codes: gloo may abort a finished rank when its peer leaves
        process.join()
    (out, grads), (same_out, same_grads) = (torch.load(tmp_path / f"found{rank}") for rank in (0, 1))
    assert torch.equal(out, same_out) and all(torch.equal(grads[name], same_grads[name]) for name in grads)
    exact_out, exact_grads = passes(one_block(torch.float32))
    single = one_block(torch.bfloat16)
    apply_fp8(list(single.blocks.children()), "tensorwise")
    whole_out, whole_grads = passes(single)
    assert 1e-3 < relative(out, exact_out) < 1.2 * relative(whole_out, exact_out) < 0.1
    assert grads.keys() == exact_grads.keys()
    for name, exact in exact_grads.items():
        assert relative(grads[name], exact) < 1.2 * relative(whole_grads[name], exact) < 0.2, name


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
