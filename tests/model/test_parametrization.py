"""Models of any size behave alike under mup and completep, and are exported as what they compute."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.coordinate_check import activations
from model.config import ModelConfig, ModelError, Parametrization
from model.hf.families import Granite, export_family
from model.layers import Scales, scales_of
from model.transformer import Transformer
from tests.models import small_model
from training.config import MuonScale, OptimizerConfig
from training.optim.optimizer import Optimizer

COMPLETEP = {"base_width": 32, "base_depth": 2, "parametrization": Parametrization.completep}
CONFIG = small_model(vocab_size=96, d_model=64, n_layers=6, d_ff=96, attention_bias=True, **COMPLETEP)
TOKENS_BT = torch.arange(40).view(2, 20) % 96


def built(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    model.init_weights(seed=1)
    for param in model.parameters():  # biases too
        param.data += 0.02 * torch.randn(param.shape, generator=torch.Generator().manual_seed(param.numel()))
    return model.eval()


def test_factors_of_the_table() -> None:
    hidden = Scales(std=2**-0.5, lr=0.5, weight_decay=2.0, eps=1 / 6)
    assert scales_of(CONFIG, "blocks.1.mlp.w_up.weight", 2) == hidden
    assert scales_of(CONFIG, "blocks.1.attention_norm.weight", 1) == Scales(eps=1 / 6)
    assert scales_of(CONFIG, "embed.weight", 2) == scales_of(CONFIG, "norm.weight", 1) == Scales(eps=0.5)
    mup = replace(CONFIG, parametrization=Parametrization.mup)
    assert scales_of(mup, "blocks.1.mlp.w_up.weight", 2) == hidden._replace(eps=0.5)
    assert mup.depth_ratio == 1 and CONFIG.depth_ratio == 3
    assert scales_of(replace(CONFIG, parametrization=Parametrization.standard), "blocks.0.x", 2) == Scales()


def test_a_model_of_base_width_is_the_standard_one() -> None:
    mup = replace(CONFIG, parametrization=Parametrization.mup, base_width=64)
    standard = replace(CONFIG, parametrization=Parametrization.standard)
    assert torch.equal(built(mup)(TOKENS_BT), built(standard)(TOKENS_BT))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_rates_decay_and_eps_of_each_group(name: str) -> None:
    config = OptimizerConfig(
        name=name, lr=1e-2, weight_decay=0.1, eps=1e-8, embed_lr_scale=3.0, head_lr_scale=5.0, vector_lr_scale=7.0,
        scale=MuonScale.spectral,
    )  # fmt: skip
    optimizer = Optimizer(Transformer(CONFIG), config)
    groups = {param: group for group, names in optimizer.groups.items() for param in names}
    hidden = (0.5, 0.2, 1e-8 / 6) if name == "adamw" else (1.0, 0.1, 1e-8)
    expected = {
        "blocks.2.attention.wq.weight": hidden,
        "blocks.2.attention.wq.bias": (7.0, 0.0, 1e-8 / 6),
        "embed.weight": (3.0, 0.1, 5e-9),
        "head.weight": (5.0, 0.1, 5e-9),
    }
    for param, of_group in expected.items():
        assert groups[param][1:] == pytest.approx(of_group), param


@pytest.mark.parametrize("tied", [False, True])
def test_exported_model_has_equal_logits(tied: bool, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = replace(CONFIG, tie_embeddings=tied)
    ours, family = built(config), export_family(config)
    about = family.write_config(config, dtype="float32")
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**about))
    names = family.names(config)
    weights = {names[name]: param * family.factor(name, config) for name, param in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight", "model.rotary_emb.inv_freq"}
    theirs.tie_weights()
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(TOKENS_BT).logits, ours(TOKENS_BT), rtol=0, atol=2e-5)
    if tied:
        assert isinstance(family, Granite)
        again = family.read_config(about, tmp_path)
        assert (again.width_ratio, again.depth_ratio) == (config.width_ratio, config.depth_ratio)
        with pytest.raises(ModelError, match="multipliers"):
            family.read_config(about | {"embedding_multiplier": 12.0}, tmp_path)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_activations_grow_with_width_only_under_standard(optimizer: str) -> None:
    def growth(way: Parametrization) -> float:
        small, large = (activations(way, optimizer, width, steps=4)["logits"][-1] for width in (64, 256))
        return large / small

    found = {way.value: growth(way) for way in Parametrization}
    assert found["standard"] > 2 and max(found["mup"], found["completep"]) < 1.3
