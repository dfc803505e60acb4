"""A new MLP, plugged in by its name from outside the product code, with a loss of its own."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import export
from conf.schema import ExportConfig
from model.config import ModelConfig, ModelError
from model.counts import count_params, flops_per_token
from model.layers import AuxLosses, SwiGLU
from model.transformer import Transformer
from tests.conftest import metrics, trained
from training.checkpoint import open_checkpoint

NAME = f"{__name__}:Experts"
CONFIG = ModelConfig(
    name="experts", vocab_size=64, d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, d_ff=24, max_seq_len=32, mlp=NAME
)


class Experts(nn.Module):
    """Three MLPs, a router that weights them, and a loss that is least where all have the same share."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = nn.Linear(config.d_model, 3, bias=False)
        self.experts = nn.ModuleList(SwiGLU(config) for _ in range(3))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        shares_BT3 = self.router(x_BTD).float().softmax(-1)
        outs = [expert(x_BTD) * shares_BT3[..., i, None].type_as(x_BTD) for i, expert in enumerate(self.experts)]
        return sum(outs, torch.zeros_like(x_BTD)), {"balance": 3 * shares_BT3.mean((0, 1)).square().sum()}

    def forward_flops(self, seq_len: int) -> int:
        return 2 * sum(param.numel() for param in self.parameters())


@pytest.fixture
def model() -> Transformer:
    model = Transformer(CONFIG)
    model.init_weights(0)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(20)  # shares far from equal
    return model


TOKENS_BT = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def gradients(model: Transformer, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("way", ["whole", "recomputed", "stages"])
def test_auxiliary_losses_join_the_gradient_with_their_weight(model: Transformer, way: str) -> None:
    losses: list[Tensor] = []
    blocks: list[Any] = list(model.blocks.values())
    hooks = [block.mlp.register_forward_hook(lambda *args: losses.append(args[2][1]["balance"])) for block in blocks]
    loss = model(TOKENS_BT).square().mean()
    expected = gradients(model, loss + 0.25 * sum(losses))
    total = float(sum(losses).detach())  # type: ignore[union-attr]
    for hook in hooks:
        hook.remove()
    aux = AuxLosses(torch.tensor(0.25))
    if way == "stages":
        first, last = model.make_stage([0]), model.make_stage([1])
        out = last(first(TOKENS_BT, aux=aux), aux=aux)
    else:
        if way == "recomputed":
            for block in blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        out = model(TOKENS_BT, aux=aux)
    found = gradients(model, out.square().mean())
    assert float(aux.sums["balance"]) == pytest.approx(total) and not aux.sums["balance"].requires_grad
    plain = gradients(model, model(TOKENS_BT).square().mean())
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(plain["blocks.0.mlp.router.weight"], expected["blocks.0.mlp.router.weight"], rtol=1e-2)


def test_counts_follow_the_new_mlp() -> None:
    plain = replace(CONFIG, mlp="swiglu")
    swiglu = 3 * CONFIG.d_model * CONFIG.d_ff
    more = CONFIG.n_layers * (2 * swiglu + 3 * CONFIG.d_model)
    assert count_params(CONFIG) - count_params(plain) == more
    assert flops_per_token(CONFIG, 32) - flops_per_token(plain, 32) == 6 * more


def test_new_mlp_trains_and_cannot_be_exported(tmp_path: Path, small: list[str]) -> None:
    trained(tmp_path / "r", *small, f"model.mlp={NAME}", "steps=3", "logger.every=1")
    records = [record for record in metrics(tmp_path / "r") if "train/loss" in record]
    assert len(records) == 3 and all(math.isfinite(record["train/loss"]) for record in records)
    assert all(record["train/balance"] >= 2 for record in records), "at least 1 per layer"
    assert "model.blocks.1.mlp.experts.2.w_up.weight" in open_checkpoint(tmp_path / "r").tensors
    with pytest.raises(ModelError, match=r"model\.mlp"):
        export.export(ExportConfig(run=str(tmp_path / "r"), out=str(tmp_path / "hf")))
    assert not (tmp_path / "hf").exists()


def test_tensor_parallelism_needs_a_style_of_each_module(model: Transformer) -> None:
    with pytest.raises(ModelError, match=r"blocks\.0\.mlp\.router"):
        model.tp_plan()


@pytest.mark.parametrize("name", ["no_such_module:MLP", "model.layers:NoSuch"])
def test_name_that_cannot_be_imported(name: str) -> None:
    with pytest.raises(ModelError, match=r"model\.mlp"):
        Transformer.on_meta(replace(CONFIG, mlp=name))
    assert any("model.mlp (nothing)" in problem for problem in replace(CONFIG, mlp="nothing").problems())
