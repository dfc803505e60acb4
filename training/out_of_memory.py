"""What a step needs of one device's memory, in closed form, for when it was not there."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from conf.schema import TrainConfig
from model.counts import count_params
from parallel.config import ParallelError
from parallel.parallelize import recomputed_blocks
from training.setup import compute_dtype

GIB = 2**30
GRAD_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
MASTER_BYTES = {torch.bfloat16: 2, torch.float16: 4, torch.float32: 0}  # beside the parameter


def step_bytes(config: TrainConfig) -> dict[str, float]:
    """Return the bytes of weights, gradients and optimizer (`state`), `activations` and `logits` at a step's height.

    They are those of a device that holds the whole model.
    """
    model, precision, tokens = config.model, config.precision, config.micro_batch_tokens
    dtype, _ = compute_dtype(precision, torch.device("cuda"))
    size, kv_dim = dtype.itemsize, model.n_kv_heads * model.head_dim
    grad = size if precision.grad_dtype is None else GRAD_BYTES[precision.grad_dtype.value]
    moments = 2 * GRAD_BYTES[config.optimizer.state_dtype.value]
    recomputed = recomputed_blocks(model.n_layers, config.parallel)
    # Inputs of products and norms, q, k, v, attention's output, gate, up and their product; or a block's input alone.
    kept = 6 * model.d_model + 2 * kv_dim + 3 * model.d_ff
    chunk = min(tokens, config.loss.chunk_tokens)
    sums = 4 if chunk < tokens else 0  # the head's gradient, added up in fp32 over chunks
    return {
        "state": count_params(model) * (size + MASTER_BYTES[dtype] + grad + moments),
        "activations": tokens * size * (kept * (model.n_layers - recomputed) + model.d_model * recomputed),
        "logits": model.vocab_size * (chunk * size + model.d_model * (sums + size)),
    }


def remedy(config: TrainConfig) -> str:
    """Return the settings that save most memory."""
    needs, rows = step_bytes(config), config.data.micro_batch_size
    state, activations = needs["state"], needs["activations"]
    if rows > 1 and activations > state / 4:
        return f"lower data.micro_batch_size ({rows})"
    if recomputed_blocks(config.model.n_layers, config.parallel) < config.model.n_layers and activations > state / 8:
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
        raise ParallelError(
            f"out of memory: on one device this step needs about {parts} (GiB); {remedy(config)}; "
            f"the device reported: {str(error).splitlines()[0]}"
        ) from error
