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
    recomputes_all = parallel.activation_checkpointing is ActivationCheckpointing.full
    choices = {
        f"data.micro_batch_size={rows // 2}": rows > 1,
        "optimizer.state_dtype=bf16": config.optimizer.state_dtype is Dtype.fp32,
        "parallel.activation_checkpointing=full": not recomputes_all,
        "parallel=zero3 on more GPUs": parallel.zero_stage < 3,
    }
    return [setting for setting, saves in choices.items() if saves] or ["a smaller model or data.seq_len"]


@contextmanager
def explain_oom(config: TrainConfig) -> Iterator[None]:
    """Turn CUDA's error into the settings to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ParallelError(
            f"out of memory: {str(error).splitlines()[0]}; try {', '.join(remedies(config))}; dry_run=true prints "
            "what the memory is used for"
        ) from error
