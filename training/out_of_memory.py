"""What a step needs of a device's memory, in closed form, and the sentence for when it was not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from model.counts import count_params
from parallel.config import ParallelError
from parallel.parallelize import recomputed_blocks

GIB = 2**30
SIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(kw_only=True, frozen=True, slots=True)
class Needs:
    """Bytes of one device that holds the whole model, at the height of a step."""

    n_params: int
    n_layers: int
    d_model: int
    kv_dim: int
    d_ff: int
    vocab_size: int
    tokens: int  # of a micro-batch
    chunk_tokens: int  # whose logits exist at one time
    param_bytes: int = 2
    master_bytes: int = 2  # beside the parameter
    grad_bytes: int = 2
    state_bytes: int = 8  # both moments
    recomputed: float = 0.0  # share of the blocks whose activations are computed again

    @property
    def state(self) -> float:
        per_param = self.param_bytes + self.master_bytes + self.grad_bytes + self.state_bytes
        return self.n_params * per_param

    @property
    def activations(self) -> float:
        """For the backward pass: inputs of products and norms, q, k, v, attention's output, gate, up, their product."""
        kept = self.param_bytes * (5 * self.d_model + self.d_model + 2 * self.kv_dim + 3 * self.d_ff)
        only_input = self.param_bytes * self.d_model
        return self.tokens * self.n_layers * (kept * (1 - self.recomputed) + only_input * self.recomputed)

    @property
    def logits(self) -> float:
        """A chunk of them, and the head's gradient, which is added up in fp32 if there are several chunks."""
        chunk = min(self.tokens, self.chunk_tokens)
        sums = 4 if chunk < self.tokens else 0
        return chunk * self.vocab_size * self.param_bytes + self.vocab_size * self.d_model * (sums + self.param_bytes)

    def __str__(self) -> str:
        total = self.state + self.activations + self.logits
        return (
            f"about {total / GIB:.1f} GiB: {self.state / GIB:.1f} for weights, gradients and optimizer, "
            f"{self.activations / GIB:.1f} for the activations of {self.tokens:,} tokens, "
            f"{self.logits / GIB:.1f} for logits"
        )


def remedy(needs: Needs, rows: int) -> str:
    """Name the settings that give most of the memory back."""
    if rows > 1 and needs.activations > needs.state / 4:
        return f"lower data.micro_batch_size ({rows})"
    if needs.recomputed < 1 and needs.activations > needs.state / 8:
        return "set parallel.activation_checkpointing=full, or lower data.micro_batch_size or data.seq_len"
    if needs.state_bytes > 4:
        return "set optimizer.state_dtype=bf16, or share the optimizer's state among more GPUs (parallel=zero1)"
    return "share parameters and the optimizer's state among more GPUs (parallel=zero3), or choose a smaller model"


def needs_of(config: Any) -> Needs:
    """Read what a step needs off a run's whole configuration."""
    model, precision, parallel = config.model, config.precision, config.parallel
    compute = precision.compute.value
    return Needs(
        n_params=count_params(model),
        n_layers=model.n_layers,
        d_model=model.d_model,
        kv_dim=model.n_kv_heads * model.head_dim,
        d_ff=model.d_ff,
        vocab_size=model.vocab_size,
        tokens=config.micro_batch_tokens,
        chunk_tokens=config.loss.chunk_tokens,
        param_bytes=SIZE[compute],
        master_bytes={"bf16": 2, "fp16": 4, "fp32": 0}[compute],
        grad_bytes=SIZE[compute if precision.grad_dtype is None else precision.grad_dtype.value],
        state_bytes=2 * SIZE[config.optimizer.state_dtype.value],
        recomputed=recomputed_blocks(model.n_layers, parallel) / model.n_layers,
    )


@contextmanager
def explain_oom(config: Any) -> Iterator[None]:
    """Turn CUDA's message into a sentence: what was estimated for one device, and which setting to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        estimate = needs_of(config)
        raise ParallelError(
            f"out of memory: on one device this step needs {estimate}; "
            f"{remedy(estimate, config.data.micro_batch_size)}; the device said: {str(error).splitlines()[0]}"
        ) from error
