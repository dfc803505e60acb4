"""What a step needs of one device's memory, in closed form, for when it was not there."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from conf.schema import TrainConfig
from model.counts import count_params
from parallel.config import ParallelError
from parallel.parallelize import recomputed_blocks
from training.setup import DTYPES, compute_dtype

GIB = 2**30


def step_bytes(config: TrainConfig) -> dict[str, float]:
    """Return the bytes of weights, gradients and optimizer (`state`), `activations` and `logits` at a step's height.

    They are those of a device that holds the whole model.
    """
    model, precision, tokens = config.model, config.precision, config.micro_batch_tokens
    size = compute_dtype(precision, torch.device("cuda"))[0].itemsize
    master = {"fp16": 4}.get(precision.compute.value, 4 - size)  # beside the parameter
    grad = size if precision.grad_dtype is None else DTYPES[precision.grad_dtype.value].itemsize
    moments = 2 * DTYPES[config.optimizer.state_dtype.value].itemsize
    recomputed = recomputed_blocks(model.n_layers, config.parallel)
    # Inputs of products and norms, q, k, v, attention's output, gate, up and their product; or a block's input alone.
    kept = 6 * model.d_model + 2 * model.n_kv_heads * model.head_dim + 3 * model.d_ff
    chunk = min(tokens, config.loss.chunk_tokens)
    sums = 4 if chunk < tokens else 0  # the head's gradient, added up in fp32 over chunks
    return {
        "state": count_params(model) * (size + master + grad + moments),
        "activations": tokens * size * (kept * (model.n_layers - recomputed) + model.d_model * recomputed),
        "logits": model.vocab_size * (chunk * size + model.d_model * (sums + size)),
    }


def remedy(config: TrainConfig) -> str:
    """Return the settings that save most memory."""
    needs, rows, n_layers = step_bytes(config), config.data.micro_batch_size, config.model.n_layers
    share = needs["activations"] / needs["state"]
    if rows > 1 and share > 1 / 4:
        return f"lower data.micro_batch_size ({rows})"
    if recomputed_blocks(n_layers, config.parallel) < n_layers and share > 1 / 8:
        return "set parallel.activation_checkpointing=full, or lower data.micro_batch_size or data.seq_len"
    if config.optimizer.state_dtype.value == "fp32":
        return "set optimizer.state_dtype=bf16, or share the optimizer's state among more GPUs (parallel=zero1)"
    return "share parameters and optimizer state among more GPUs (parallel=zero3), or choose a smaller model"


@contextmanager
def explain_oom(config: TrainConfig) -> Iterator[None]:
    """Turn CUDA's error into what was estimated for one device, and which setting to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        parts = ", ".join(f"{value / GIB:.1f} for {name}" for name, value in step_bytes(config).items())
        reported = str(error).splitlines()[0]
        raise ParallelError(
            f"out of memory: one device needs about {parts} (GiB); {remedy(config)}; CUDA reported: {reported}"
        ) from error
