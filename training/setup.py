"""Model and engine as a configuration wants them, joined from the rooms that do not know each other."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from conf.schema import TrainConfig
from data.dataset import Corpus
from data.loader import train_batches
from model.config import ModelConfig, ModelError
from model.counts import flops_per_token as causal_flops_per_token
from model.counts import internlm_flops_per_token
from model.hf.families import pad_vocabulary, read_config, read_weights
from model.transformer import Transformer
from parallel.counters import StepCounters
from parallel.engine import Engine
from parallel.mesh import Mesh
from parallel.parallelize import parallelize, write_shard
from training.metrics import Throughput, peak_tflops
from training.schedules import learning_rate, second_beta
from training.state import TrainState

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def build_model(
    config: TrainConfig, mesh: Mesh, fill: Callable[[Any, int], object] | None = None
) -> tuple[Any, list[Any]]:
    """Make the model whole on the meta device, give it its dtype and place, and fill it in; gives its stages too.

    `fill(model, seed)` draws the weights in another way than the model does.
    """
    torch.manual_seed(config.seed)
    model = Transformer.on_meta(config.model)
    precision = config.precision
    stages = parallelize(
        model,
        mesh,
        config.parallel,
        DTYPES[precision.compute.value],
        fp8=precision.fp8.value,
        grad_dtype=None if precision.grad_dtype is None else DTYPES[precision.grad_dtype.value],
    )
    if fill is None:
        model.init_weights(config.seed, write_shard)
    else:
        fill(model, config.seed)
    return model, stages


def build_engine(
    config: TrainConfig,
    mesh: Mesh,
    model: Any,
    stages: list[Any],
    optimizer: Any,
    scaler: Any,
    progress: TrainState,
    *,
    n_sources: int,
    bytes_per_token: Any = None,
) -> Engine:
    """Return the engine of a model and an optimizer, counting on from `progress`."""
    counts = (progress.updates, progress.nonfinite_steps, progress.nonfinite_in_a_row)
    return Engine(
        model,
        optimizer,
        mesh,
        parallel=config.parallel,
        loss=config.loss,
        scaler=scaler,
        counters=StepCounters(mesh.device, counts),
        max_grad_norm=config.optimizer.max_grad_norm,
        n_sources=n_sources,
        stages=stages,
        bytes_per_token=None if bytes_per_token is None else torch.from_numpy(bytes_per_token),
    )


def build_train_batches(config: TrainConfig, mesh: Mesh, corpus: Corpus, progress: TrainState) -> Any:
    """Read the micro-batches of this rank, step by step, from where the run stands."""
    return train_batches(
        corpus,
        config.data,
        packs_of_step=config.packs_of_step,
        first_step=progress.step,
        first_sample=progress.samples,
        pin_memory=mesh.device.type == "cuda",
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
    )


def lr_schedule(config: TrainConfig, progress: TrainState) -> list[tuple[float, float]]:
    """Give the learning rate and beta2 of each update that the steps left may make."""
    updates = range(progress.updates, progress.updates + config.steps - progress.step + 1)
    rate = partial(learning_rate, steps=config.steps, lr=config.optimizer.lr, config=config.scheduler)
    return [(rate(update), second_beta(update, config.optimizer)) for update in updates]


def read_hf_weights(folder: Path, *, model: ModelConfig) -> dict[str, Any]:
    """Read the weights of a Hugging Face folder, by our names, for a model whose vocabulary may be larger than its own.

    Raises `ModelError` if the folder's model would compute something else with them.
    """
    found = read_config(folder)[0]
    keys = ("n_layers", "n_heads", "n_kv_heads", "rope_theta", "norm_eps", "attention_bias", "tie_embeddings")
    wrong = [f"model.{key}={getattr(found, key)}" for key in keys if getattr(found, key) != getattr(model, key)]
    if wrong:
        raise ModelError(f"init_from ({folder}) is of another model than {model.name}; give {' '.join(wrong)}")
    return pad_vocabulary(read_weights(folder), model.vocab_size)


def flops_per_token(config: TrainConfig) -> tuple[float, float]:
    """Give the FLOPs of a token as MFU counts them, and by InternLM's formula, which counts what is recomputed."""
    recompute = config.parallel.activation_checkpointing.value != "none"
    seq_len = config.data.seq_len
    causal = causal_flops_per_token(config.model, seq_len)
    return causal, internlm_flops_per_token(config.model, seq_len, recompute=recompute)


def build_throughput(config: TrainConfig, mesh: Mesh) -> Any:
    """Give the run's throughput meter: FLOPs of a token by both counts, and the device's peak."""
    causal, internlm = flops_per_token(config)
    return Throughput(
        world_size=mesh.world_size,
        internlm_flops=internlm,
        causal_flops=causal,
        peak=config.logger.peak_tflops or peak_tflops(mesh.device),
    )
