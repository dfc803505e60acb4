"""Train a model: python train.py model=7b data=pile_small; README.md lists every group.

Nothing here imports torch before the configuration is known to be right.
"""

import logging
import os
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from conf.command import is_sentence, run, sentences
from conf.schema import TrainConfig, parse_ranges, to_config
from model.config import Attention
from parallel.launch import launch
from training.run_folder import refuse_early

if TYPE_CHECKING:
    from data.corpus import Corpus
    from parallel.dry_run import DryRun
    from parallel.engine import Engine
    from parallel.mesh import Mesh
    from training.progress import Progress
    from training.report import Report
    from training.stop import StopRequest

logger = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    config: TrainConfig = to_config(cfg)
    run_config: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    run_dir = Path(os.path.relpath(HydraConfig.get().runtime.output_dir))

    with sentences():
        if config.dry_run.enabled:
            return rehearse(config)
        refuse_early(run_dir, run_config, config.checkpoint)
        return launch(work, config, run_config, run_dir, config=config.parallel, says_enough=is_sentence)


def work(config: TrainConfig, run_config: dict[str, Any], run_dir: Path) -> float | None:
    """Be one rank of a run and give its validation loss; a stop that was asked for exits with a signal's code."""
    # Near the end of a device's memory, freed pieces between others are lost without it. Read as CUDA starts.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    from parallel.mesh import distributed
    from parallel.out_of_memory import told_when_memory_ends
    from parallel.slurm import go_on_later
    from training.logs import log_to
    from training.run_folder import locked
    from training.status import Status
    from training.stop import StopRequest

    with (
        distributed(config.parallel) as mesh,
        locked(run_dir, mesh.rank),
        log_to(run_dir, mesh.rank),
        Status(run_dir, run_config, rank=mesh.rank) as status,
        StopRequest(mesh.maximum) as stop,
        told_when_memory_ends(config),
    ):
        valid_loss = train(config, run_config, mesh, run_dir, stop)
        status.end(valid_loss, stopped=bool(stop), given_up=stop.given_up)
    if stop.for_a_requeue:
        go_on_later(run_dir, rank=mesh.rank, max_requeues=config.launcher.max_requeues)
    if stop and not stop.given_up:
        sys.exit(stop.exit_code)
    return valid_loss


def train(
    config: TrainConfig, run_config: dict[str, Any], mesh: "Mesh", run_dir: Path, stop: "StopRequest"
) -> float | None:
    """Run the steps that are left of a run and give its validation loss."""

    from data.corpus import open_corpus
    from training.checkpoint import Checkpoints
    from training.optimizer import AdamW
    from training.progress import Progress
    from training.report import Report
    from training.resume import Kept, resume_or_start
    from training.run_folder import truncate_metrics
    from training.scaler import LossScaler
    from training.sinks import Sinks

    # Data: checked first, because it is wrong most often and opened in no time.
    corpus = open_corpus(config.data, vocab_size=config.model.vocab_size)

    model, stages = build_model(config, mesh)
    optimizer, scaler, progress = (
        AdamW(model, config.optimizer, copies=model.copies),
        LossScaler(config.precision),
        Progress(),
    )
    kept = Kept(optimizer, scaler, progress, mesh.rank)
    checkpoints = Checkpoints(run_dir, keep=config.checkpoint.keep, group=mesh.host)
    resume_or_start(
        kept,
        checkpoints,
        config.checkpoint,
        run_config=run_config,
        parts=corpus.parts,
        read_hf=partial(read_hf_weights, vocab_size=config.model.vocab_size),
    )
    corpus.train.begin_at(progress.first_sample)
    optimizer.follow(rates_to_come(config, progress))
    engine = build_engine(
        config,
        mesh,
        model,
        stages,
        optimizer,
        scaler,
        progress,
        n_sources=len(corpus.sources),
        bytes_per_token=corpus.bytes_per_token,
    )
    mesh.on_first(keep_inputs, config, run_config, run_dir, corpus)
    describe(config, mesh, corpus, progress, run_dir)
    validated = progress.validated_step == progress.step
    mesh.on_first(truncate_metrics, run_dir / "metrics.jsonl", progress.step, validated)

    if config.profile:
        measure(config, engine, corpus, progress, run_dir / "profile")
        return None

    def save() -> None:
        progress.read(engine.counts())
        about = {"parts": corpus.parts, "sources": corpus.sources}
        about |= {"add_bos": corpus.add_bos, "add_eos": corpus.add_eos}
        state = {"config": run_config, "data": about, **kept.state()}
        logger.info("saved %s", checkpoints.save(progress.step, kept.tensors(), state))

    with Sinks(run_dir, config.logger, run_config=run_config, step=progress.step, rank=mesh.rank) as sinks:
        report = Report(sinks, clock(config, mesh), sources=corpus.sources, steps=config.steps)
        loop(config, engine, corpus, progress, report, stop, save)
    return progress.valid_loss


def measure(config: TrainConfig, engine: "Engine", corpus: "Corpus", progress: "Progress", folder: Path) -> None:
    """Run a few steps under the profiler and show where their time goes."""
    from training.profile import profile_steps

    with closing(batches_to_come(config, engine.mesh, corpus, progress)) as batches_of_steps:
        found = profile_steps(lambda: engine.train_step(next(batches_of_steps)), engine.mesh.device, folder)
    (folder / "table.txt").write_text(found + "\n")
    for line in (*found.splitlines(), f"trace and table in {folder}"):
        logger.info("%s", line)


def rehearse(config: TrainConfig) -> None:
    """Print what a step would be on `dry_run.world_size` GPUs, from the code that would run it."""
    from parallel.dry_run import report

    model = config.model
    for line in report(
        dry_run(config),
        name=model.name,
        n_params=model.n_params,
        global_batch_tokens=config.global_batch_tokens,
        micro_batch_tokens=config.micro_batch_tokens,
    ):
        print(line)


def dry_run(config: TrainConfig) -> "DryRun":
    """Join model, optimizer and engine for ranks and GPUs that are not there."""
    from parallel.dry_run import DryRun, FakeBatch
    from training.optimizer import AdamW
    from training.progress import Progress
    from training.scaler import LossScaler

    def build(mesh: "Mesh") -> "Engine":
        model, stages = build_model(config, mesh)
        optimizer, progress = AdamW(model, config.optimizer, copies=model.copies), Progress()
        optimizer.follow(rates_to_come(config, progress)[:1])
        return build_engine(config, mesh, model, stages, optimizer, LossScaler(config.precision), progress, n_sources=1)

    if config.model.attention is not Attention.reference:
        config.model.attention = Attention.sdpa  # keeps what every fused kernel keeps, and can be run without one
    data = config.data
    batch = partial(FakeBatch.of, config.micro_batch_tokens // data.pack_tokens, data.pack_tokens, data.seq_len)
    kernels = ("model.loss_kernel", "training.adamw_kernel")
    return DryRun(build, batch, config.parallel, config.dry_run, kernels=kernels)


def build_model(config: TrainConfig, mesh: "Mesh") -> tuple[Any, list[Any]]:
    """Make the model whole on the meta device, give it its dtype and place, and fill it in; gives its stages too."""
    import torch

    from model.transformer import Transformer
    from parallel.apply import parallelize, write_shard

    torch.manual_seed(config.seed)
    with torch.device("meta"):
        model = Transformer(config.model)
    precision = config.precision
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
    stages = parallelize(
        model,
        mesh,
        config.parallel,
        dtypes[precision.compute.value],
        fp8=precision.fp8.value,
        grad_dtype=None if precision.grad_dtype is None else dtypes[precision.grad_dtype.value],
    )
    model.init_weights(config.seed, write_shard)
    return model, stages


def read_hf_weights(folder: Path, *, vocab_size: int) -> dict[str, Any]:
    """Read the weights of a Hugging Face folder, by our names, with a vocabulary that may be larger than its own."""
    from model.hf import pad_vocabulary, read_hf

    return pad_vocabulary(read_hf(folder)[1], vocab_size)


def loop(
    config: TrainConfig,
    engine: "Engine",
    corpus: "Corpus",
    progress: "Progress",
    report: "Report",
    stop: "StopRequest",
    save: Callable[[], None],
) -> None:
    """Take batches and steps until the run is over or asked to stop; what is due comes after each step."""
    from training.early_stop import is_hopeless
    from training.garbage import collected_between_steps
    from training.progress import check_bad_steps
    from training.run_folder import StopFile

    left_out = parse_ranges(config.skip_batches)
    stop_file = StopFile(config.checkpoint.stop_file)
    # The batches' workers end with the loop, however it ends.
    batches_to_end = closing(batches_to_come(config, engine.mesh, corpus, progress))
    with batches_to_end as batches_of_steps, collected_between_steps() as collect_garbage:
        validate_if_due(config, engine, corpus, progress, report, stop)  # if a stop cut it short
        while progress.step < config.steps and not stop:
            report.throughput.begin()
            batches = next(batches_of_steps)
            report.throughput.data_ready()
            skip = any(progress.step in part for part in left_out)
            samples = config.packs_of_step(progress.step)
            progress.take(samples=samples, tokens=samples * config.data.pack_tokens)
            if skip:
                progress.skipped_steps += 1
                logger.info("step %d/%d  left out, as skip_batches asks", progress.step, config.steps)
            else:
                scale = engine.scaler.scale
                result = engine.train_step(batches)
                if progress.step % config.logger.every and progress.step < config.steps:
                    report.throughput.end(result.n_tokens)
                else:
                    bad = progress.read(engine.counts())  # waits for the device: the host runs ahead in between
                    report.throughput.end(result.n_tokens)
                    if bad:
                        limit = config.optimizer.max_bad_steps
                        check_bad_steps(progress, limit, partial(engine.first_bad_layer, batches))
                    collect_garbage()
                    lr, beta2 = result.rates_2.tolist()
                    epochs = corpus.train.epochs(progress.samples)
                    report.step(progress, result, epochs, lr=lr, beta2=beta2, loss_scale=scale)
            if is_hopeless(config.early_stop, report.sinks.run_dir, progress.step):
                stop.give_up()
            stop.agree()
            validate_if_due(config, engine, corpus, progress, report, stop)
            save_here, stop_here = stop_file.read(progress.step)
            every = config.checkpoint.every
            if save_here or stop or progress.step == config.steps or (every and progress.step % every == 0):
                save()
            if stop_here:
                logger.info("stopped at step %d, as %s asks", progress.step, config.checkpoint.stop_file)
                break
    report.sinks.plot()


def batches_to_come(config: TrainConfig, mesh: "Mesh", corpus: "Corpus", progress: "Progress") -> Any:
    """Read the micro-batches of this rank, step by step, from where the run stands."""
    from data.loader import train_batches

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


def validate_if_due(
    config: TrainConfig,
    engine: "Engine",
    corpus: "Corpus",
    progress: "Progress",
    report: "Report",
    stop: "StopRequest",
) -> None:
    """Score the validation split at the end and every `valid_every` steps; a stop cuts it short, to be done again."""
    from data.loader import valid_batches

    step, every = progress.step, config.valid_every
    due = step == config.steps or bool(step and every and step % every == 0)
    if due and progress.validated_step != step and corpus.valid.n_packs:
        mesh = engine.mesh
        batches = valid_batches(
            corpus, config.data, max_tokens=config.valid_tokens, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size
        )
        totals_S4 = engine.evaluate(takewhile(lambda _: not stop, batches))
        if not stop:
            report.validation(progress, totals_S4)


def rates_to_come(config: TrainConfig, progress: "Progress") -> list[tuple[float, float]]:
    """Give the learning rate and beta2 of each update that the steps left may make."""
    from training.schedule import learning_rate, second_beta

    updates = range(progress.updates, progress.updates + config.steps - progress.step + 1)
    rate = partial(learning_rate, steps=config.steps, lr=config.optimizer.lr, config=config.scheduler)
    return [(rate(update), second_beta(update, config.optimizer)) for update in updates]


def build_engine(
    config: TrainConfig,
    mesh: "Mesh",
    model: Any,
    stages: list[Any],
    optimizer: Any,
    scaler: Any,
    progress: "Progress",
    *,
    n_sources: int,
    bytes_per_token: Any = None,
) -> "Engine":
    """Join the model's loss, the way tokens are averaged, and the update into an engine."""
    import torch

    from model.loss import linear_cross_entropy
    from parallel.engine import Engine
    from training.token_weights import token_weights

    loss = config.loss
    return Engine(
        model,
        optimizer,
        mesh,
        linear_loss=partial(
            linear_cross_entropy,
            chunk_tokens=loss.chunk_tokens,
            label_smoothing=loss.label_smoothing,
            z_loss=loss.z_loss,
        ),
        token_weights=partial(token_weights, reduction=loss.reduction),
        scaler=scaler,
        max_grad_norm=config.optimizer.max_grad_norm,
        n_sources=n_sources,
        config=config.parallel,
        stages=stages,
        bytes_per_token=None if bytes_per_token is None else torch.from_numpy(bytes_per_token),
        counts=(progress.updates, progress.bad_steps, progress.bad_in_a_row),
    )


def clock(config: TrainConfig, mesh: "Mesh") -> Any:
    """Give the run's throughput meter: FLOPs of a token by both counts, and the device's peak."""
    from training.metrics import Throughput, peak_tflops

    recompute = config.parallel.activation_checkpointing.value != "none"
    return Throughput(
        world_size=mesh.world_size,
        internlm_flops=config.model.internlm_flops_per_token(config.data.seq_len, recompute=recompute),
        causal_flops=config.model.flops_per_token(config.data.seq_len),
        peak=config.logger.peak_tflops or peak_tflops(mesh.device),
    )


def keep_inputs(config: TrainConfig, run_config: dict[str, Any], run_dir: Path, corpus: "Corpus") -> None:
    """Put the configuration and the tokenizer into the run folder, for whoever reads its checkpoints."""
    from data.tokenizer import save_tokenizer

    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(run_config))
    if corpus.tokenizer is not None:
        save_tokenizer(corpus.tokenizer, run_dir / "tokenizer")


def describe(config: TrainConfig, mesh: "Mesh", corpus: "Corpus", progress: "Progress", run_dir: Path) -> None:
    """Say what is about to be trained, on what, and from where."""
    import torch

    from model.attention import resolve_backend

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
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[config.precision.compute.value]
    alone, packed = (resolve_backend(model.attention, mesh.device, dtype, equal=equal).value for equal in (True, False))
    attention = alone if alone == packed else f"{alone}, and {packed} for packs of several documents"
    fp8 = config.precision.fp8.value
    precision = config.precision.compute.value + ("" if fp8 == "none" else f" with {fp8} 8-bit products")
    for line in (
        f"run        {run_dir}",
        f"model      {model.name}: {model.n_params:,} parameters, {model.n_layers} layers x {model.d_model}, "
        f"vocabulary {model.vocab_size:,}",
        f"           {model.flops_per_token(data.seq_len) / 1e9:.4g} GFLOP a token (causal), "
        f"{model.internlm_flops_per_token(data.seq_len) / 1e9:.4g} by InternLM's formula",
        f"data       {data.name}: {train_tokens:,} training tokens in packs of {data.pack_tokens}, "
        f"sources {', '.join(corpus.sources)}",
        f"batch      {config.global_batch_tokens:,} tokens = {config.grad_accum_steps(mesh.dp_size)} micro-batches of "
        f"{config.micro_batch_tokens:,}; {config.steps:,} steps; epochs: {by_source}",
        f"packing    {data.packing.value}: {padding:.2%} of the tokens are padding, {cut:.2%} of the documents are cut",
        f"device     {device}, {precision}, attention {attention}",
        f"start      step {progress.step}",
    ):
        logger.info("%s", line)


if __name__ == "__main__":
    run(main, "train")
