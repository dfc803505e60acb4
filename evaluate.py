"""Evaluate a model: python evaluate.py run=runs/demo tasks=[builtin]; or hf=folder, step=500; also under torchrun."""

import json
import logging
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # no traceback on Ctrl-C during imports
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from conf.cli import run
from conf.schema import EvaluateConfig, stored
from launch.ranks import launch
from model.config import ModelError
from training.config import CheckpointError

if TYPE_CHECKING:
    from data.config import DataConfig
    from data.dataset import Corpus
    from parallel.mesh import Mesh
    from training.load import Saved

logger = logging.getLogger(__name__)


def main(config: EvaluateConfig) -> None:
    launch(work, config, config=config.parallel)


def work(config: EvaluateConfig) -> dict[str, float]:
    """Run one rank of an evaluation; log, store and return the scores."""
    from parallel.mesh import distributed
    from tracking.logs import screen
    from tracking.store import local_run
    from training.load import open_saved
    from training.ranks import Ranks

    with distributed(config.parallel) as mesh, screen(logging.WARNING if mesh.rank else logging.INFO):
        origin = Ranks(mesh.host).on_first(lambda: local_run(str(config.run or config.hf), config.step))
        saved = open_saved(origin, config.step)
        metrics = evaluate(config, saved, mesh)
        mesh.on_rank_zero(store, config, saved, metrics)
    return metrics


def evaluate(config: EvaluateConfig, saved: "Saved", mesh: "Mesh") -> dict[str, float]:
    """Evaluate the validation split of a run's data, by source, and tasks; a collective."""
    from data.loader import valid_batches
    from training.evaluation import Tasks, task_lines
    from training.report import loss_metrics, valid_lines
    from training.scoring import fitting_shape
    from training.setup import build_evaluator

    opened = open_data(config, saved)
    engine = build_evaluator(saved, mesh, config.parallel, config.dtype, opened and opened[0])
    metrics = dict[str, float]()
    if opened:
        corpus, data = opened
        ranks = {"dp_rank": mesh.dp_rank, "dp_size": mesh.dp_size}
        totals_S4 = engine.evaluate(valid_batches(corpus, data, max_tokens=config.valid_tokens, **ranks))
        metrics = loss_metrics(totals_S4.tolist(), corpus.sources, "valid")
        for line in valid_lines(metrics, corpus.sources):
            logger.info("%s", line)
    if (config.tasks or config.harness) and saved.tokenizer is None:
        raise ModelError(f"{config.run or config.hf} has no tokenizer, which tasks need")
    if config.tasks and saved.tokenizer is not None:
        tasks = Tasks(config.tasks, saved.tokenizer, add_bos=saved.add_bos)
        shape = fitting_shape(engine, tasks.texts, config.batch_tokens)
        metrics |= tasks.metrics(engine, shape)
    if config.harness and saved.tokenizer is not None:
        from training.harness import HarnessModel, harness_metrics

        batch_tokens, add_bos = config.batch_tokens, saved.add_bos
        model = HarnessModel(engine, saved.tokenizer, add_bos=add_bos, batch_tokens=batch_tokens)
        metrics |= harness_metrics(model, config.harness)
    for line in task_lines(metrics):
        logger.info("%s", line)
    return metrics


def open_data(config: EvaluateConfig, saved: "Saved") -> "tuple[Corpus, DataConfig] | None":
    """Return the corpus, by default the run's, and its configuration; None without a validation split."""
    from corpus.config import Source
    from data.config import DataConfig
    from data.dataset import open_corpus
    from training.preflight import fits

    trained_on = saved.checkpoint.state["config"].get("data") if saved.checkpoint else None
    if config.valid_tokens == 0 or not (config.corpus or trained_on):
        return None
    if trained_on:
        data = stored(DataConfig, trained_on)
    else:
        length = saved.config.max_seq_len
        data = DataConfig(name="", path="", source=Source.local, seq_len=length, micro_batch_size=1)
    if config.corpus:
        data = replace(data, path=config.corpus, source=Source.local, mix={})
        if config.seq_len:
            data = replace(data, seq_len=config.seq_len, pack_len=None)
        packs = max(1, config.batch_tokens // data.pack_tokens)
        data.micro_batch_size = packs * data.pack_tokens // data.seq_len
    corpus = open_corpus(data, vocab_size=saved.config.vocab_size)
    if config.corpus and saved.tokenizer and corpus.tokenizer and not fits(saved.tokenizer, corpus.tokenizer):
        remedy = f"prepare it with tokenizer.model={saved.tokenizer.path}"
        raise ModelError(f"corpus ({config.corpus}) has another tokenizer than the model; {remedy}")
    if config.corpus and not corpus.valid.n_packs:
        raise ModelError(f"corpus ({config.corpus}) has no validation split of {data.seq_len:,} tokens or more")
    if saved.checkpoint and not config.corpus and corpus.fingerprints != saved.checkpoint.state["data"]["parts"]:
        logger.warning("the data has changed since this checkpoint; the validation split may have training data")
    return (corpus, data) if corpus.valid.n_packs else None


def store(config: EvaluateConfig, saved: "Saved", metrics: dict[str, float]) -> None:
    """Write the scores to evaluation.json in the run or Hugging Face folder, and to the run's metrics."""
    from tracking.metrics_file import METRICS, add_record
    from tracking.run_folder import locked, run_dir_of, write_atomically

    checkpoint = saved.checkpoint
    folder = Path(str(config.hf)) if checkpoint is None else run_dir_of(checkpoint.path)
    path, step = folder / "evaluation.json", "" if checkpoint is None else str(checkpoint.step)
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    # By step, and by corpus if it is another than the run's, to keep the other scores
    of_corpus = f"{step} {config.corpus or ''}".strip()
    for key, value in metrics.items():
        before.setdefault(of_corpus if key.startswith("valid/") else step, {})[key] = value
    write_atomically(path, json.dumps(before, indent=2) + "\n")
    logger.info("in %s", path)
    is_whole = config.valid_tokens is None and config.corpus is None  # comparable with the run's own validations
    scores = {key: value for key, value in metrics.items() if is_whole or not key.startswith("valid/")}
    if checkpoint is not None and scores:
        try:
            with locked(folder):
                tokens = checkpoint.state["progress"]["tokens"]
                add_record(folder / METRICS, {"step": checkpoint.step, "tokens": tokens, **scores})
        except CheckpointError as error:  # locked: the run is training and writes its metrics
            logger.info("not in %s: %s", METRICS, error)


if __name__ == "__main__":
    run(main, "evaluate")
