"""What every test may use."""

import os

import pytest
import torch

# Two threads, as on the smallest machine the tests must pass on: results depend on the count.
torch.set_num_threads(2)
os.environ.setdefault("OMP_NUM_THREADS", "2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
