"""Advice on out-of-memory errors."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from parallel.config import ParallelError

REMEDIES = "a smaller data.micro_batch_size, parallel.activation_checkpointing=full, or parallel=zero3 on more GPUs"


@contextmanager
def explain_oom() -> Iterator[None]:
    """Turn CUDA's out-of-memory error into a `ParallelError` that names settings to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = str(error).splitlines()[0]
        raise ParallelError(f"out of memory: {what}; try {REMEDIES}; dry_run=true estimates memory") from error
