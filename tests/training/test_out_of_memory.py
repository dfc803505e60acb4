"""What is raised when a device is full."""

import pytest
import torch

from parallel.config import ParallelError
from training.out_of_memory import explain_oom


def test_an_oom_names_the_settings_to_change() -> None:
    with pytest.raises(ParallelError, match=r"1 GiB; try .*data.micro_batch_size, .*zero3"), explain_oom():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")
    with pytest.raises(ZeroDivisionError), explain_oom():
        _ = 1 // 0
