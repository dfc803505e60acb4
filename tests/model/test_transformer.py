"""The model against transformers' Llama, closed forms, and itself."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from conf.cli import CONF
from conf.schema import register, to_config
from model.config import Attention, Init, ModelConfig
from model.counts import count_params, flops_per_token, internlm_flops_per_token
from model.hf.llama import Llama
from model.layers import rotary_angles, rotate
from model.transformer import Transformer

register()
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))


def config(**changes: object) -> ModelConfig:
    base = ModelConfig(
        name="test",
        vocab_size=96,
        d_model=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        d_ff=48,
        max_seq_len=64,
        init=Init.llama,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def drawn(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model whose biases and norms are random too, so that none of them can hide."""
    model = Transformer(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(torch.randn(param.shape, generator=generator) * 0.1)
    return model


def tokens(rows: int = 2, length: int = 17, seed: int = 1) -> Tensor:
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_gradients_equal_transformers_llama(bias: bool, n_kv_heads: int, tied: bool) -> None:
    ours = drawn(config(attention_bias=bias, n_kv_heads=n_kv_heads, tie_embeddings=tied, rope_theta=5000.0))
    llama, names = Llama().write_config(ours.config, dtype="float32"), Llama().names(ours.config)
    theirs = LlamaForCausalLM(LlamaConfig(**{**llama, "attn_implementation": "eager"}))
    weights = {names[name]: param.detach() for name, param in ours.named_parameters()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and missing in ([], ["lm_head.weight"] if tied else [])
    x_BT = tokens()
    mine, other = ours(x_BT), theirs(x_BT).logits
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    for logits in (mine, other):
        F.cross_entropy(logits.flatten(0, 1), x_BT.flatten().roll(-1)).backward()
    gradients = dict(theirs.named_parameters())
    for name, param in ours.named_parameters():
        torch.testing.assert_close(param.grad, gradients[names[name]].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", [Attention.reference, Attention.sdpa])
@pytest.mark.parametrize("lengths", [[[5, 9, 3], [1, 16]], [[8, 8], [8, 8]], [[17], [17]]])
def test_a_document_in_a_pack_equals_the_document_alone(backend: Attention, lengths: list[list[int]]) -> None:
    model = drawn(config(attention=backend, attention_bias=True))
    x_BT = tokens(2, sum(lengths[0]))
    flat = [n for row in lengths for n in row]
    positions_BT = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    cu_seqlens = torch.tensor([0, *flat]).cumsum(0).int()
    packed = model(x_BT, positions_BT=positions_BT, cu_seqlens=cu_seqlens, max_seq_len=max(flat))
    packed.square().sum().backward()
    together = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    model.zero_grad()
    documents = x_BT.flatten().split(flat)
    alone = [model(document[None])[0] for document in documents]
    torch.testing.assert_close(packed.flatten(0, 1), torch.cat(alone), rtol=1e-5, atol=1e-5)
    torch.cat(alone).square().sum().backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(together[name], param.grad, rtol=1e-4, atol=1e-5)


def test_a_token_changes_nothing_before_it() -> None:
    model, x_BT = drawn(config()), tokens(1)
    changed = x_BT.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 96
    before, after = model(x_BT), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_rotary_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def score(i: int, j: int) -> float:
        places = torch.tensor([[i]]), torch.tensor([[j]])
        turned = [rotate(x, *rotary_angles(p, 16, 10000.0)) for x, p in zip((q, k), places, strict=True)]
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-4)
    assert score(7, 3) != pytest.approx(score(8, 3), rel=1e-2)


def test_the_head_is_called_with_the_hidden_states_and_its_weight() -> None:
    model, x_BT = drawn(config()), tokens()
    h_BTD, weight_VD = model(x_BT, head=lambda h, weight: (h, weight))
    torch.testing.assert_close(h_BTD @ weight_VD.T, model(x_BT))


def test_embed_grad_scale_scales_the_embeddings_gradient_and_nothing_else() -> None:
    plain, scaled = drawn(config()), drawn(config(embed_grad_scale=0.1))
    outputs = [model(tokens()) for model in (plain, scaled)]
    torch.testing.assert_close(*outputs)
    for out in outputs:
        out.square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad * (0.1 if name == "embed.weight" else 1.0), b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_counts_equal_closed_forms(name: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        c = to_config(compose("train", overrides=[f"model={name}"])).model
    kv_dim, T = c.n_kv_heads * c.head_dim, 2048
    attention, mlp, vocabulary = 2 * c.d_model * (c.d_model + kv_dim), 3 * c.d_model * c.d_ff, c.vocab_size * c.d_model
    vectors = 2 * c.d_model + c.attention_bias * 2 * (c.d_model + kv_dim)
    matrices = c.n_layers * (attention + mlp)
    copies = 1 if c.tie_embeddings else 2
    assert count_params(c) == copies * vocabulary + matrices + c.n_layers * vectors + c.d_model
    assert flops_per_token(c, T) == 6 * (matrices + vocabulary + c.n_layers * c.d_model * (T + 1))
    if name == "7b":  # InternLM's published figures
        assert count_params(c) == 7_321_948_160
        assert flops_per_token(c, T) == pytest.approx(43.0e9, rel=1e-3)
        assert internlm_flops_per_token(c, T) == pytest.approx(44.41e9, rel=2e-4)
        assert internlm_flops_per_token(c, T, recompute=True) == pytest.approx(58.37e9, rel=2e-4)
        assert internlm_flops_per_token(c, T) * 4103 == pytest.approx(182.2e12, rel=5e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_tp_plan_has_each_module_with_parameters_once(bias: bool) -> None:
    model = drawn(config(attention_bias=bias))
    plan = model.tp_plan()
    assert plan.keys() == {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert {path.rpartition(".")[2] for path, style in plan.items() if style == "rowwise"} == {"embed", "wo", "w_down"}
    stage = model.make_stage([1]).tp_plan()
    assert stage.items() <= plan.items() and "embed" not in stage and "head" in stage


EMBED, BASE = (
    {"internlm": 0.0052, "internlm_v1": 0.0052, "llama": 0.02},
    {"internlm": 0.006, "internlm_v1": 0.006, "llama": 0.02},
)


@pytest.mark.parametrize("scheme", list(Init))
def test_every_parameter_has_its_schemes_deviation(scheme: Init) -> None:
    model = Transformer(config(init=scheme, d_model=256, d_ff=512, vocab_size=512, attention_bias=True))
    model.init_weights(seed=0)
    base, s = BASE[scheme.value], scheme.value
    for layer in range(2):
        down = {
            "internlm": base / math.sqrt(2 * (layer + 1)),
            "internlm_v1": 0.0015,
            "llama": base / math.sqrt(2 * (layer + 1)),
        }
        up = base / math.sqrt(2 * (layer + 1)) if s == "internlm_v1" else base
        expected = {
            "attention.wq": base, "attention.wk": base, "attention.wv": base,
            "attention.wo": base / math.sqrt(2 * (layer + 1)),
            "mlp.w_gate": base, "mlp.w_up": up, "mlp.w_down": down[s],
        }  # fmt: skip
        for name, std in expected.items():
            weight = model.get_parameter(f"blocks.{layer}.{name}.weight").detach()
            assert float(weight.std()) == pytest.approx(std, rel=0.03), (layer, name)
            assert abs(float(weight.mean())) < 0.05 * std
    assert float(model.get_parameter("embed.weight").detach().std()) == pytest.approx(EMBED[s], rel=0.03)
    for name, param in model.named_parameters():
        if param.ndim == 1:
            assert (param == (0.0 if name.endswith("bias") else 1.0)).all(), name


def test_weights_depend_on_the_seed_and_not_on_place_or_dtype() -> None:
    direct = Transformer(config())
    direct.init_weights(seed=5)
    with torch.device("meta"):
        late = Transformer(config()).to(torch.bfloat16)
    late.to_empty(device="cpu")
    late.init_weights(seed=5)
    for a, b in zip(direct.parameters(), late.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)
    direct.init_weights(seed=6)
    assert not torch.equal(direct.get_parameter("embed.weight").bfloat16(), late.get_parameter("embed.weight"))


def test_an_untrained_model_knows_nothing() -> None:
    model = Transformer(config(init=Init.internlm, vocab_size=512))
    model.init_weights(seed=0)
    x_BT = tokens(4, 64)
    loss = F.cross_entropy(model(x_BT).flatten(0, 1), x_BT.flatten().roll(-1)).detach()
    assert float(loss) == pytest.approx(math.log(512), rel=0.02)
