"""Build model, engine, batches and schedule of a run from its configuration."""

from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from conf.schema import TrainConfig
from data.batches import Batch
from data.dataset import Corpus
from data.loader import train_batches
from model.counts import flops_per_token, internlm_flops_per_token
from model.transformer import Transformer
from parallel.config import ParallelConfig
from parallel.engine import Engine, LossScaler
from parallel.mesh import Mesh
from parallel.parallelize import ParallelModel, parallelize
from training.config import Dtype, LossConfig, OptimizerConfig, PrecisionConfig, TrainingError
from training.load import Saved
from training.optim.optimizer import Optimizer
from training.report import Throughput, peak_tflops
from training.schedules import learning_rate, second_beta
from training.state import TrainState

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def compute_dtype(config: PrecisionConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of weights and activations; auto: bf16 if the device supports it natively."""
    if config.compute is not Dtype.auto:
        return DTYPES[config.compute.value]
    if device.type == "cuda":
        # A dry run's fake GPU supports it.
        fast = not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def build_model(
    config: TrainConfig, mesh: Mesh, fill: Callable[[ParallelModel, int], object] = ParallelModel.init_weights
) -> ParallelModel:
    """Return this rank's shards of the parallelized model, with weights."""
    torch.manual_seed(config.seed)
    model = Transformer.on_meta(config.model)
    precision = config.precision
    dtype = compute_dtype(precision, mesh.device)
    grad_dtype = DTYPES[precision.grad_dtype.value] if precision.grad_dtype else None
    parallel = parallelize(model, mesh, config.parallel, dtype, fp8=precision.fp8.value, grad_dtype=grad_dtype)
    fill(parallel, config.seed)
    return parallel


def build_engine(
    config: TrainConfig, model: ParallelModel, state: TrainState, corpus: Corpus | None = None, *, trains: bool = True
) -> Engine:
    """Return the engine of a run, with an optimizer if it `trains`.

    Without a corpus, losses are of one source and not per byte.
    """
    optimizer = Optimizer(model.module, config.optimizer, model.params) if trains else None
    if optimizer and config.parallel.cuda_graphs and not all(rule.on_device for rule in optimizer.rules):
        raise TrainingError("parallel.cuda_graphs (true) needs an optimizer that runs on the device, such as adamw")
    loss: Any = {"loss": config.loss, "max_grad_norm": config.optimizer.max_grad_norm}
    if corpus is not None:
        n_bytes = None if corpus.bytes_per_token is None else torch.from_numpy(corpus.bytes_per_token)
        loss |= {"n_sources": len(corpus.sources), "bytes_per_token": n_bytes}
    return Engine(model, optimizer, LossScaler(config.precision), state.counts_3, **loss)


def build_evaluator(
    saved: Saved, mesh: Mesh, parallel: ParallelConfig, dtype: Dtype, corpus: Corpus | None = None
) -> Engine:
    """Return an engine that evaluates a saved model, without an optimizer.

    The padding of the vocabulary is dropped, as in an export, to a multiple of tp.
    """
    config, tokenizer, checkpoint = saved.config, saved.tokenizer, saved.checkpoint
    if tokenizer is not None and checkpoint is not None and checkpoint.state["data"]["parts"]:
        rows = -(-tokenizer.vocab_size // mesh.axes.tp) * mesh.axes.tp
        config = replace(config, vocab_size=min(config.vocab_size, rows))
    precision, loss, parallel = PrecisionConfig(compute=dtype), LossConfig(), replace(parallel, cuda_graphs=False)
    run = TrainConfig(model=config, parallel=parallel, precision=precision, loss=loss, optimizer=OptimizerConfig())

    def fill(model: ParallelModel, _seed: int) -> None:
        weights = saved.read() if checkpoint is None else {}
        for name, param in model.params.items():
            name = model.module.tied_params.get(name, name)
            # Reads one full weight at a time.
            whole = weights[name] if checkpoint is None else checkpoint.read(f"model.{name}")[""]
            param.write(whole[: param.shape[0]])

    return build_engine(run, build_model(run, mesh, fill), TrainState(device=mesh.device), corpus, trains=False)


def build_train_batches(
    config: TrainConfig, mesh: Mesh, corpus: Corpus, state: TrainState
) -> Generator[list[Batch], None, None]:
    """Yield this rank's micro-batches of each step from the current one on."""
    return train_batches(
        corpus,
        config.data,
        packs_of_step=config.packs_of_step,
        first_step=state.step,
        first_sample=state.samples,
        pin_memory=mesh.device.type == "cuda",
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
    )


def lr_schedule(config: TrainConfig, state: TrainState) -> list[tuple[float, float]]:
    """Return learning rate and beta2 of every remaining update."""
    updates = range(state.updates, state.updates + config.steps - state.step + 1)
    rate = partial(learning_rate, steps=config.steps, lr=config.optimizer.lr, config=config.scheduler)
    return [(rate(update), second_beta(update, config.optimizer)) for update in updates]


def step_flops(config: TrainConfig) -> tuple[float, float]:
    """Return the FLOPs per token for MFU, and by InternLM's formula, which includes recomputation."""
    recompute = config.parallel.activation_checkpointing.value in ("full", "fraction")
    model, seq_len = config.model, config.data.seq_len
    return flops_per_token(model, seq_len), internlm_flops_per_token(model, seq_len, recompute=recompute)


def build_throughput(config: TrainConfig, mesh: Mesh) -> Throughput:
    causal, internlm = step_flops(config)
    peak = config.logger.peak_tflops or peak_tflops(mesh.device)
    return Throughput(world_size=mesh.world_size, internlm_flops=internlm, causal_flops=causal, peak=peak)
