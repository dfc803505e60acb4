"""The estimate against what was read on a card, and the sentence."""

import pytest
import torch
from hydra import compose, initialize_config_dir

from conf.cli import CONF
from conf.schema import register, to_config
from parallel.config import ParallelError
from training.out_of_memory import GIB, Needs, explain_oom, remedy

SEVEN = {
    "n_params": 7_321_948_160, "n_layers": 32, "d_model": 4096, "kv_dim": 4096, "d_ff": 11008, "vocab_size": 103168,
    "chunk_tokens": 4096,
}  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "state_bytes", "read_gib"),
    [(8192, 8, 131.0), (16384, 4, 136.1)],  # on one H200, docs/performance.md
)
def test_the_estimate_is_what_a_card_held(tokens: int, state_bytes: int, read_gib: float) -> None:
    needs = Needs(**SEVEN, tokens=tokens, state_bytes=state_bytes)
    assert (needs.state + needs.activations + needs.logits) / GIB == pytest.approx(read_gib, rel=0.05)


def test_a_device_that_is_full_is_told_in_a_sentence_with_the_setting_to_change() -> None:
    message = (
        r"out of memory: on one device this step needs about 16\d.\d GiB: 95.5 for weights, .* of 16,384 tokens, .*; "
        r"lower data.micro_batch_size \(8\); the device said: CUDA out of memory"
    )
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = ["model=7b", "data=random", "data.micro_batch_size=8", "global_batch_tokens=16384"]
        config = to_config(compose("train", overrides=overrides))
    with pytest.raises(ParallelError, match=message), explain_oom(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")
    with pytest.raises(ZeroDivisionError), explain_oom(config):
        _ = 1 // 0


def test_the_remedy_is_the_setting_that_gives_most_back() -> None:
    assert "activation_checkpointing=full" in remedy(Needs(**SEVEN, tokens=4096), 1)
    assert "optimizer.state_dtype=bf16" in remedy(Needs(**SEVEN, tokens=4096, recomputed=1.0), 1)
    assert "parallel=zero3" in remedy(Needs(**SEVEN, tokens=512, state_bytes=4), 1)
