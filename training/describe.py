"""The summary that a run logs before its first step, and the inputs that it saves in its folder."""

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from conf.schema import TrainConfig
from data.dataset import Corpus
from data.packing import waste
from data.show import note_batches
from data.tokenizer import save_tokenizer
from model.attention import resolve_backend
from model.counts import count_params
from parallel.engine import Engine
from training.config import Dtype, Fp8
from training.setup import DTYPES, compute_dtype, step_flops
from training.state import TrainState

logger = logging.getLogger(__name__)
MANY_MICRO_BATCHES = 64  # from here on sums of gradients in bf16 are off by about 1%, at 512 by up to 8%


def describe(config: TrainConfig, engine: Engine, corpus: Corpus, state: TrainState, run_dir: Path) -> None:
    """Log a summary of model, data, batch, optimizer, device and first step."""
    model, data, precision = config.model, config.data, config.precision
    mesh, rules = engine.mesh, engine.optimizer.rules
    on_gpu = mesh.device.type == "cuda"
    device = torch.cuda.get_device_name(mesh.device) if on_gpu else f"CPU (threads: {torch.get_num_threads()})"
    last_sample = state.samples + sum(config.packs_of_step(step) for step in range(state.step, config.steps))
    epochs = corpus.train.epochs(last_sample)
    by_source = ", ".join(f"{corpus.sources[source]} {epochs[source]:.2f}" for source in sorted(epochs))
    without = [corpus.sources[n] for n in corpus.train.sources if n not in corpus.valid.sources]
    padding, cut = waste(corpus.train.n_packs, corpus.train.pieces, data.pack_tokens)
    dtype = compute_dtype(precision, mesh.device)
    computes = next(name for name, known in DTYPES.items() if known is dtype)
    if precision.compute is Dtype.auto:
        missing = f": this {'GPU' if on_gpu else 'CPU'} has no bf16 instructions" * (computes != "bf16")
        computes += f" (auto{missing})"
    if precision.fp8 is not Fp8.none:
        computes += f" with {precision.fp8.value} fp8 products"
    alone, packed = (resolve_backend(model.attention, mesh.device, dtype, equal=equal).value for equal in (True, False))
    attention = alone if alone == packed else f"{alone}, and {packed} for packs of several documents"
    n_micro_batches = config.grad_accum_steps(mesh.dp_size)
    bf16_sums = dtype is torch.bfloat16 and precision.grad_dtype is None and config.parallel.zero_stage < 2
    is_slow_tp = on_gpu and mesh.axes.tp > 1 and mesh.axes.pp == 1 and not config.parallel.cuda_graphs
    is_slow_tp = is_slow_tp and dtype is torch.bfloat16 and precision.fp8 is Fp8.none  # with which both go
    causal, internlm = step_flops(config)
    update = sum(rule.flops() for rule in rules) * mesh.world_size / (causal * config.global_batch_tokens)
    for line in (
        f"run        {run_dir}",
        f"model      {model.name}: {count_params(model):,} parameters, {model.n_layers} layers x {model.d_model}, "
        f"vocabulary {model.vocab_size:,}",
        f"           {causal / 1e9:.4g} GFLOP per token (causal), {internlm / 1e9:.4g} by InternLM's formula",
        f"data       {data.name}: {sum(file.n_tokens for file in corpus.train.files):,} training tokens in "
        f"{corpus.train.n_packs:,} packs of {data.pack_tokens}, sources {', '.join(corpus.sources)}"
        + (f"; no validation documents of {', '.join(without)}" if without else ""),
        f"batch      {config.global_batch_tokens:,} tokens, micro-batches per rank: {n_micro_batches} of "
        f"{config.micro_batch_tokens:,}; steps: {config.steps:,}; epochs: {by_source}"
        + "; precision.grad_dtype=fp32 avoids rounding as their gradients accumulate"
        * (bf16_sums and n_micro_batches > MANY_MICRO_BATCHES),
        f"packing    {data.packing}: {padding:.2%} of the tokens are padding, {cut:.2%} of the documents are truncated"
        + "; truncated parts are not trained on" * (cut > 0 and any(file.conversations for file in corpus.train.files)),
        f"optimizer  {config.optimizer.name}" + (f", {update:.1%} of a step's FLOPs" if update else ""),
        f"device     {device}, {computes}, attention {attention}"
        + "; tp is faster with parallel.async_tp=true parallel.cuda_graphs=true" * is_slow_tp,
        f"start      step {state.step}" + (", nothing is left to train" if state.step >= config.steps else ""),
    ):
        logger.info("%s", line)


def save_run_inputs(run_config: dict[str, Any], run_dir: Path, corpus: Corpus, state: TrainState) -> None:
    """Write the configuration, the record of batches and the tokenizer to the run folder."""
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(run_config), encoding="utf-8")
    note_batches(run_dir, run_config, corpus, step=state.step, samples=state.samples, first_sample=state.first_sample)
    if corpus.tokenizer is not None:
        save_tokenizer(corpus.tokenizer, run_dir / "tokenizer")
