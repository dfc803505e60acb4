"""8-bit products against exact ones."""

import pytest
import torch
from torch import Tensor, nn

from parallel.fp8 import E4M3, E5M2, Fp8Linear, to_fp8_both_ways


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


def compare(device: str) -> None:
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


def test_the_product_and_its_gradients_are_as_exact_as_8_bits_are() -> None:
    compare("cpu")


@pytest.mark.gpu
def test_the_product_and_its_gradients_are_as_exact_on_the_card() -> None:
    compare("cuda")


def test_a_number_of_tokens_that_8_bit_products_do_not_take_is_multiplied_exactly() -> None:
    linear = nn.Linear(32, 16)
    x = torch.randn(3, 5, 32)
    expected = linear(x)
    linear.__class__ = Fp8Linear
    assert torch.equal(linear(x), expected)


# Of dynamo's own look at the inputs of what it compiles
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf", "ignore:.*should not be instantiated"
)
def test_the_product_is_compiled_without_a_break() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 16, dtype=torch.bfloat16)
    linear.__class__ = Fp8Linear
    x = torch.randn(2, 16, 32, dtype=torch.bfloat16, requires_grad=True)
    grads = []
    for forward in (linear, torch.compile(linear, fullgraph=True, backend="aot_eager")):
        grads.append(torch.autograd.grad(forward(x).square().sum(), (x, *linear.parameters())))
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=2e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_the_kernel_casts_as_torch_does_and_turns(dtype: torch.dtype) -> None:
    x = torch.randn(1000, 333, device="cuda", dtype=torch.bfloat16)
    scale = torch.finfo(dtype).max / x.abs().amax().float()
    cast, turned = to_fp8_both_ways(x, scale, dtype)
    assert torch.equal(cast.float(), (x.float() * scale).to(dtype).float())
    assert turned.is_contiguous() and torch.equal(turned.float(), cast.float().T)
