"""What a run says of itself before its first step, and leaves in its folder for whoever reads it later."""

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from conf.schema import TrainConfig
from data.dataset import Corpus
from data.tokenizer import export_problem, save_tokenizer
from model.attention import resolve_backend
from parallel.mesh import Mesh
from training.setup import DTYPES, flops_per_token
from training.state import TrainState

logger = logging.getLogger(__name__)


def describe(config: TrainConfig, mesh: Mesh, corpus: Corpus, progress: TrainState, run_dir: Path) -> None:
    """Say what is about to be trained, on what, and from where."""
    model, data = config.model, config.data
    device = (
        torch.cuda.get_device_name(mesh.device)
        if mesh.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    train_tokens = corpus.train.n_packs * data.pack_tokens
    last_sample = progress.samples + sum(config.packs_of_step(step) for step in range(progress.step, config.steps))
    epochs = corpus.train.epochs(last_sample)
    by_source = ", ".join(f"{corpus.sources[source]} {epochs[source]:.2f}" for source in sorted(epochs))
    padding, cut = corpus.train.waste()
    dtype = DTYPES[config.precision.compute.value]
    alone, packed = (resolve_backend(model.attention, mesh.device, dtype, equal=equal).value for equal in (True, False))
    attention = alone if alone == packed else f"{alone}, and {packed} for packs of several documents"
    fp8 = config.precision.fp8.value
    precision = config.precision.compute.value + ("" if fp8 == "none" else f" with {fp8} 8-bit products")
    causal, internlm = flops_per_token(config)
    start = f"step {progress.step}" + (", the last: nothing is left to train" if progress.step >= config.steps else "")
    for line in (
        f"run        {run_dir}",
        f"model      {model.name}: {model.n_params:,} parameters, {model.n_layers} layers x {model.d_model}, "
        f"vocabulary {model.vocab_size:,}",
        f"           {causal / 1e9:.4g} GFLOP a token (causal), {internlm / 1e9:.4g} by InternLM's formula",
        f"data       {data.name}: {train_tokens:,} training tokens in packs of {data.pack_tokens}, "
        f"sources {', '.join(corpus.sources)}",
        f"batch      {config.global_batch_tokens:,} tokens = {config.grad_accum_steps(mesh.dp_size)} micro-batches of "
        f"{config.micro_batch_tokens:,}; {config.steps:,} steps; epochs: {by_source}",
        f"packing    {data.packing}: {padding:.2%} of the tokens are padding, {cut:.2%} of the documents are cut",
        f"device     {device}, {precision}, attention {attention}",
        f"start      {start}",
    ):
        logger.info("%s", line)
    if mesh.rank == 0 and corpus.tokenizer is not None and (problem := export_problem(corpus.tokenizer)):
        logger.warning("%s", problem)


def save_run_inputs(config: TrainConfig, run_config: dict[str, Any], run_dir: Path, corpus: Corpus) -> None:
    """Put the configuration and the tokenizer into the run folder, for whoever reads its checkpoints."""
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(run_config))
    if corpus.tokenizer is not None:
        save_tokenizer(corpus.tokenizer, run_dir / "tokenizer")
