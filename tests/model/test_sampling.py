"""Decoding: with and without a cache, alone and together, against transformers."""

from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.attention import KVCache
from model.hf.families import Llama
from model.sampling import Sampling, generate, next_logits
from model.transformer import Transformer
from tests.models import small_model

PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(small_model(max_seq_len=48, attention_bias=True))
    model.init_weights(0)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 2:
                param.mul_(8.0)  # far from uniform, so that a wrong state shows
    return model


def run(
    model: Transformer, sampling: Sampling, prompts: list[list[int]] = PROMPTS, **changes: object
) -> list[list[int]]:
    settings: dict = {"max_new_tokens": 12, "stop_ids": set(), "seeds": list(range(len(prompts)))}
    return generate(model, prompts, sampling, **{**settings, **changes})


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.2, 0.9, 20, 0.9)])
def test_cached_decoding_equals_uncached_token_for_token(model: Transformer, sampling: Sampling) -> None:
    cached, whole = run(model, sampling), run(model, sampling, use_cache=False)
    assert cached == whole
    assert [len(new) for new in cached] == [12, 12, 12]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.1, 1.0, 0, 0.95)])
def test_text_does_not_depend_on_its_neighbours(model: Transformer, sampling: Sampling) -> None:
    together = run(model, sampling)
    assert together == [run(model, sampling, [prompt], seeds=[row])[0] for row, prompt in enumerate(PROMPTS)]


def test_cached_logits_equal_the_full_forward(model: Transformer) -> None:
    tokens_BT = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.config, 2, 20, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        parts = [
            model(tokens_BT[:, a:b], positions_BT=torch.arange(a, b).expand(2, -1), cache=cache)
            for a, b in [(0, 7), (7, 8), (8, 20)]
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens_BT), rtol=1e-4, atol=1e-4)


def test_greedy_decoding_equals_transformers(model: Transformer) -> None:
    about = Llama().write_config(model.config, dtype="float32", bos_token_id=None, eos_token_id=None, pad_token_id=0)
    theirs: Any = LlamaForCausalLM(LlamaConfig(**about))
    theirs.load_state_dict({Llama().names(model.config)[n]: p.detach() for n, p in model.named_parameters()})
    for prompt, new in zip(PROMPTS, run(model, GREEDY), strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert out[0, len(prompt) :].tolist() == new


PROCESSORS: dict[str, tuple[type, float]] = {  # in the order they are applied
    "repetition_penalty": (RepetitionPenaltyLogitsProcessor, 1.3),
    "temperature": (TemperatureLogitsWarper, 0.6),
    "top_k": (TopKLogitsWarper, 20),
    "top_p": (TopPLogitsWarper, 0.7),
}


@pytest.mark.parametrize("names", [*([name] for name in PROCESSORS), list(PROCESSORS)], ids="+".join)
def test_next_logits_equal_transformers_processors(names: list[str]) -> None:
    logits = torch.randn(64, generator=torch.Generator().manual_seed(1)) * 3
    seen, expected, settings = torch.tensor([3, 5, 5, 8]), logits[None].clone(), {}
    for name in names:
        processor, settings[name] = PROCESSORS[name]
        expected = processor(settings[name])(seen[None], expected)
    torch.testing.assert_close(next_logits(logits, seen.unique(), Sampling(**settings)), expected[0])


def test_draws_follow_the_distribution(model: Transformer) -> None:
    drawn = run(model, Sampling(temperature=2.0), [[5, 9, 3]] * 2000, max_new_tokens=1, seeds=list(range(2000)))
    counts = torch.tensor([new[0] for new in drawn]).bincount(minlength=64) / 2000
    with torch.no_grad():
        expected = (model(torch.tensor([[5, 9, 3]]))[0, -1] / 2).softmax(-1)
    assert (counts - expected).abs().sum() / 2 < 0.1


def test_stop_token_ends_its_text_alone_and_is_left_out(model: Transformer) -> None:
    free = run(model, GREEDY)
    stop = free[0][4]
    stopped = run(model, GREEDY, stop_ids={stop})
    assert stopped[0] == free[0][: free[0].index(stop)]
    assert all(new == old[: len(new)] for new, old in zip(stopped, free, strict=True))


def test_on_token_can_end_a_text(model: Transformer) -> None:
    heard: list[tuple[int, int]] = []

    def on_token(row: int, token: int) -> bool:
        heard.append((row, token))
        return row == 1 and len([r for r, _ in heard if r == 1]) == 3

    lengths = [len(new) for new in run(model, GREEDY, on_token=on_token)]
    assert lengths == [12, 3, 12] and len(heard) == 27


def test_text_ends_at_max_seq_len(model: Transformer) -> None:
    assert len(run(model, GREEDY, [[1] * 40], max_new_tokens=100)[0]) == 8


def test_padded_rows_of_the_vocabulary_are_never_chosen(model: Transformer) -> None:
    free, bounded = (run(model, Sampling(temperature=5.0), vocab_size=size) for size in (None, 7))
    assert max(max(new) for new in free) >= 7 > max(max(new) for new in bounded)
