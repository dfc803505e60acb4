"""The model against transformers' Llama, closed forms, and itself."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from conf.cli import CONF
from model.config import Attention, Init, ModelConfig
from model.counts import count_params, flops_per_token, internlm_flops_per_token
from model.hf.families import Llama
from model.transformer import Transformer
from tests.conftest import composed
from tests.models import small_model

MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))


def drawn(config: ModelConfig, seed: int = 0) -> Transformer:
    """Return a model whose biases and norms are random too."""
    model = Transformer(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(torch.randn(param.shape, generator=generator) * 0.1)
    return model


def tokens(rows: int = 2, length: int = 17, seed: int = 1) -> Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_gradients_equal_transformers_llama(bias: bool, n_kv_heads: int, tied: bool) -> None:
    ours = drawn(small_model(attention_bias=bias, n_kv_heads=n_kv_heads, tie_embeddings=tied, rope_theta=5000.0))
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
def test_document_in_a_pack_equals_the_document_alone(backend: Attention, lengths: list[list[int]]) -> None:
    model = drawn(small_model(attention=backend, attention_bias=True))
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


def test_embed_grad_scale_scales_the_gradient_of_the_embedding_only() -> None:
    plain, scaled = drawn(small_model()), drawn(small_model(embed_grad_scale=0.1))
    outputs = [model(tokens()) for model in (plain, scaled)]
    torch.testing.assert_close(*outputs)
    for out in outputs:
        out.square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad * (0.1 if name == "embed.weight" else 1.0), b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_counts_equal_closed_forms(name: str) -> None:
    c = composed(f"model={name}").model
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
    model = drawn(small_model(attention_bias=bias))
    plan = model.tp_plan()
    assert plan.keys() == {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert {path.rpartition(".")[2] for path, style in plan.items() if style == "rowwise"} == {"embed", "wo", "w_down"}
    stage = model.make_stage([1]).tp_plan()
    assert stage.items() <= plan.items() and "embed" not in stage and "head" in stage


STDS = {  # internlm, internlm_v1, llama; a pair is divided by sqrt(2 (layer + 1)) where its second is true
    "attention.wq": (0.006, 0.006, 0.02), "attention.wk": (0.006, 0.006, 0.02), "attention.wv": (0.006, 0.006, 0.02),
    "attention.wo": ((0.006, True), (0.006, True), (0.02, True)), "mlp.w_gate": (0.006, 0.006, 0.02),
    "mlp.w_up": (0.006, (0.006, True), 0.02), "mlp.w_down": ((0.006, True), 0.0015, (0.02, True)),
}  # fmt: skip


@pytest.mark.parametrize(("column", "scheme"), list(enumerate(Init)))
def test_every_parameter_has_the_deviation_of_its_scheme(column: int, scheme: Init) -> None:
    model = Transformer(small_model(init=scheme, d_model=256, d_ff=512, vocab_size=512, attention_bias=True))
    model.init_weights(seed=0)
    expected: dict[str, float] = dict.fromkeys(("embed", "head"), (0.0052, 0.0052, 0.02)[column])
    for name, row in STDS.items():
        std, by_depth = entry if isinstance(entry := row[column], tuple) else (entry, False)
        for layer in range(2):
            expected[f"blocks.{layer}.{name}"] = std / math.sqrt(2 * (layer + 1)) if by_depth else std
    for name, std in expected.items():
        weight = model.get_parameter(f"{name}.weight").detach()
        assert float(weight.std()) == pytest.approx(std, rel=0.03) and abs(float(weight.mean())) < 0.05 * std, name
    for name, param in model.named_parameters():
        assert param.ndim == 2 or (param == (0.0 if name.endswith("bias") else 1.0)).all(), name


def test_weights_depend_on_the_seed_not_on_device_or_dtype() -> None:
    direct, late = Transformer(small_model()), Transformer.on_meta(small_model()).to(torch.bfloat16)
    direct.init_weights(seed=5)
    late.to_empty(device="cpu")
    late.init_weights(seed=5)
    for a, b in zip(direct.parameters(), late.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)
    direct.init_weights(seed=6)
    assert not torch.equal(direct.get_parameter("embed.weight").bfloat16(), late.get_parameter("embed.weight"))
