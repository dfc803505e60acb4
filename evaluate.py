"""Evaluate a model: python evaluate.py run=runs/demo tasks=[builtin]; or hf=folder, step=500; also under torchrun."""

import json
import logging
import signal
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
    """Return a run's corpus and data configuration; None without a run or a validation split."""
    from data.config import DataConfig
    from data.dataset import open_corpus

    if config.valid_tokens == 0 or saved.checkpoint is None or "data" not in saved.checkpoint.state["config"]:
        return None
    data = stored(DataConfig, saved.checkpoint.state["config"]["data"])
    corpus = open_corpus(data, vocab_size=saved.config.vocab_size)
    if corpus.fingerprints != saved.checkpoint.state["data"]["parts"]:
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
    # By step, to keep the scores of other checkpoints
    write_atomically(path, json.dumps({**before, step: {**before.get(step, {}), **metrics}}, indent=2) + "\n")
    logger.info("in %s", path)
    if checkpoint is not None:
        try:
            with locked(folder):
                tokens = checkpoint.state["progress"]["tokens"]
                whole = {k: v for k, v in metrics.items() if config.valid_tokens is None or not k.startswith("valid/")}
                add_record(folder / METRICS, {"step": checkpoint.step, "tokens": tokens, **whole})
        except CheckpointError as error:  # locked: the run is training and writes its metrics
            logger.info("not in %s: %s", METRICS, error)


if __name__ == "__main__":
    run(main, "evaluate")
