"""The estimate of memory against what was read on a card, and the remedy."""

import pytest
import torch
from hydra import compose, initialize_config_dir

from conf.cli import CONF
from conf.schema import TrainConfig, register, to_config
from parallel.config import ParallelError
from training.out_of_memory import GIB, explain_oom, remedy, step_bytes


def seven(rows: int, *overrides: str) -> TrainConfig:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        batch = [f"data.micro_batch_size={rows}", f"global_batch_tokens={rows * 2048}", "data.seq_len=2048"]
        return to_config(compose("train", overrides=["model=7b", "data=random", "precision=bf16", *batch, *overrides]))


@pytest.mark.parametrize(
    ("rows", "dtype", "read_gib"),
    [(4, "fp32", 131.0), (8, "bf16", 136.1)],  # on one H200, docs/performance.md
)
def test_the_estimate_is_what_a_card_held(rows: int, dtype: str, read_gib: float) -> None:
    needs = step_bytes(seven(rows, f"optimizer.state_dtype={dtype}"))
    assert sum(needs.values()) / GIB == pytest.approx(read_gib, rel=0.05)


def test_an_oom_names_the_setting_to_change() -> None:
    config = seven(8)
    with (
        pytest.raises(ParallelError, match=r"95.5 for state.*data.micro_batch_size \(8\).*1 GiB$"),
        explain_oom(config),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")
    with pytest.raises(ZeroDivisionError), explain_oom(config):
        _ = 1 // 0


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        ([], "parallel.activation_checkpointing=full"),
        (["parallel.activation_checkpointing=full"], "optimizer.state_dtype=bf16"),
        (["parallel.activation_checkpointing=full", "optimizer.state_dtype=bf16"], "parallel=zero3"),
    ],
)
def test_the_remedy_saves_most(overrides: list[str], setting: str) -> None:
    assert setting in remedy(
        seven(1, "model.max_seq_len=4096", "data.seq_len=4096", "global_batch_tokens=4096", *overrides)
    )
