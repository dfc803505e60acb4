"""What to do when a step does not fit into a device's memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from conf.schema import TrainConfig
from parallel.config import ActivationCheckpointing, ParallelError
from training.config import Dtype


def remedies(config: TrainConfig) -> list[str]:
    """Return the settings that would save memory, the least expensive first."""
    parallel, rows = config.parallel, config.data.micro_batch_size
    choices = {
        f"data.micro_batch_size={rows // 2}": rows > 1,
        "optimizer.state_dtype=bf16": config.optimizer.state_dtype is Dtype.fp32,
        "parallel.activation_checkpointing=full": parallel.activation_checkpointing is not ActivationCheckpointing.full,
        "parallel=zero3 on more GPUs": parallel.zero_stage < 3,
    }
    return [setting for setting, saves in choices.items() if saves] or ["a smaller model or data.seq_len"]


@contextmanager
def explain_oom(config: TrainConfig) -> Iterator[None]:
    """Turn CUDA's error into the settings to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what, settings = str(error).splitlines()[0], ", ".join(remedies(config))
        raise ParallelError(f"out of memory: {what}; try {settings}; dry_run=true prints its use") from error
