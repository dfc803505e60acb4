"""What is raised when a device is full."""

import pytest
import torch
from hydra import compose, initialize_config_dir

from conf.cli import CONF
from conf.schema import register, to_config
from parallel.config import ParallelError
from training.out_of_memory import explain_oom, remedies


def test_an_oom_names_the_settings_to_change() -> None:
    register()
    overrides = ["model=7b", "data=random", "data.micro_batch_size=8", "global_batch_tokens=16384"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = to_config(compose("train", overrides=overrides))
    with pytest.raises(ParallelError, match=r"1 GiB; try data.micro_batch_size=4, .*zero3"), explain_oom(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")
    with pytest.raises(ZeroDivisionError), explain_oom(config):
        _ = 1 // 0
    config.data.micro_batch_size, config.parallel.zero_stage = 1, 3
    assert remedies(config) == ["optimizer.state_dtype=bf16", "parallel.activation_checkpointing=full"]
