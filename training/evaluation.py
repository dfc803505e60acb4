"""Task scores and samples of a model, saved or in training."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from conf.schema import TrainConfig
from data.tokenizer import Tokenizer
from parallel.engine import Engine
from parallel.mesh import Mesh
from training.scoring import GoOn, Shape, alone, encode, extend, score
from training.tasks import read_tasks, task_metrics

if TYPE_CHECKING:
    from training.loop import Run

T = TypeVar("T")
PREFIX = "evaluation/"

logger = logging.getLogger(__name__)


class EvaluationError(Exception):
    """An error of one rank, raised on every rank."""


class Tasks:
    """Encoded tasks."""

    def __init__(self, names: Sequence[str], tokenizer: Tokenizer, *, add_bos: bool) -> None:
        self.questions = read_tasks(names)
        every = [question for questions in self.questions.values() for question in questions]
        pairs = [pair for each in every for pair in zip(each.contexts, each.continuations, strict=True)]
        self.texts = encode(tokenizer, pairs, add_bos=add_bos)

    def metrics(self, engine: Engine, shape: Shape, go_on: GoOn = alone) -> dict[str, float]:
        """Return `evaluation/<task>/<metric>` of all tasks, scored together; a collective.

        `go_on` is as in `in_step`; if it returns False, the scores are incomplete.
        """
        longest = min(shape.context, shape.row_len)
        if n_cut := sum(len(text.ids) - 1 > longest for text in self.texts):
            logger.info("%d of %d texts of the tasks are truncated to %d tokens", n_cut, len(self.texts), longest)
        nll, greedy = score(engine, self.texts, shape, go_on)
        metrics, at = dict[str, float](), 0
        for name, questions in self.questions.items():
            end = at + sum(len(question.continuations) for question in questions)
            found = task_metrics(questions, nll[at:end], greedy[at:end])
            metrics |= {f"{PREFIX}{name}/{key}": value for key, value in found.items()}
            at = end
        return metrics


class Evaluation:
    """Tasks and samples in the training loop. If one fails, it is dropped with a warning."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, data = config, config.data
        self.shape = Shape(data.packs_per_micro_batch, data.pack_tokens, config.model.max_seq_len)  # as in training
        self.began, self.spent = time.perf_counter(), 0.0
        self.last = dict[str, float]()  # seconds
        self.dropped = set[str]()
        self.tasks: Tasks | None = None

    def score_tasks(self, run: "Run") -> None:
        """Score and log `evaluate.tasks`, unless done at this step."""
        if self.config.evaluate.tasks:
            for line in task_lines(self._attempt(run, "evaluation", self._scores)):
                logger.info("%s", line)

    def write_samples(self, run: "Run") -> None:
        """Generate and log samples after `samples.prompts`, unless done at this step."""
        if self.config.samples.prompts and self._attempt(run, "samples", self._samples):
            run.report.loggers.plot()

    def _attempt(self, run: "Run", what: str, work: Callable[["Run"], dict[str, Any]]) -> dict[str, Any]:
        """Log and return the result of `work`, or {} if it is done, dropped, too expensive, interrupted, or fails."""
        state, mesh = run.state, run.engine.mesh
        if state.evaluated.get(what) == state.step or what in self.dropped or run.stop:
            return {}
        limit, share = self.config.evaluate.max_share, self._share(self.last.get(what, 0.0))
        at_end = state.step == self.config.steps
        # Rank 0's clock decides.
        if mesh.all_reduce_max(limit is not None and share > limit and not at_end and mesh.rank == 0):
            text = "%s at step %d left out: with it they take %.1f%% of the time (evaluate.max_share is %g)"
            logger.info(text, what, state.step, 100 * share, limit)
            return {}
        start = time.perf_counter()
        try:
            found = agreed(mesh, lambda: work(run))
        except EvaluationError as error:
            self.dropped.add(what)
            mesh.on_rank_zero(logger.warning, "%s is dropped, training continues: %s", what, error)
            return {}
        if run.stop:  # incomplete; repeated on resume
            return {}
        self.last[what] = time.perf_counter() - start
        self.spent += self.last[what]
        state.evaluated[what] = state.step
        share = self._share()
        run.report.loggers.log({"step": state.step, "tokens": state.tokens, **found, "perf/evaluation_share": share})
        logger.info("%s took %.1f s; tasks and samples take %.2f%% of the time", what, self.last[what], 100 * share)
        return found

    def _share(self, more: float = 0.0) -> float:
        """Return the fraction of time since the start spent on tasks and samples, plus `more` seconds."""
        return (self.spent + more) / (time.perf_counter() - self.began + more)

    def _scores(self, run: "Run") -> dict[str, Any]:
        if self.tasks is None:
            tokenizer, add_bos = run.corpus.tokenizer, run.corpus.add_bos
            assert tokenizer is not None  # checked in the configuration
            self.tasks = agreed(run.engine.mesh, lambda: Tasks(self.config.evaluate.tasks, tokenizer, add_bos=add_bos))
        return self.tasks.metrics(run.engine, self.shape, run.agree)

    def _samples(self, run: "Run") -> dict[str, Any]:
        config, tokenizer = self.config.samples, run.corpus.tokenizer
        assert tokenizer is not None
        bos = [tokenizer.bos_id] if run.corpus.add_bos and tokenizer.bos_id is not None else []
        encoded = agreed(run.engine.mesh, lambda: [tokenizer.encode(text) for text in config.prompts])
        prompts = [[*bos, *ids] or [tokenizer.eos_id or 0] for ids in encoded]
        generators = [torch.Generator().manual_seed(number) for number in range(len(prompts))]

        def choose(number: int, new: list[int], logits_V: Tensor) -> int | None:
            logits_V = logits_V[: tokenizer.vocab_size]
            if config.temperature:
                probs_V = (logits_V / config.temperature).softmax(dim=-1)
                token = int(torch.multinomial(probs_V, 1, generator=generators[number]))
            else:
                token = int(logits_V.argmax())
            return token if token != tokenizer.eos_id else None

        new = extend(run.engine, prompts, self.shape, config.max_new_tokens, choose, run.agree)
        texts = [
            tokenizer.decode([*ids, *new_ids]).removeprefix(tokenizer.decode(ids))
            for ids, new_ids in zip(prompts, new, strict=True)
        ]
        return {"samples": [{"prompt": p, "text": text} for p, text in zip(config.prompts, texts, strict=True)]}


def agreed(mesh: Mesh, work: Callable[[], T]) -> T:
    """Return the result of `work` on this rank; raise on every rank if any raised. A collective."""
    try:
        value = work()
    except EvaluationError:  # on every rank
        raise
    except Exception as error:
        raise_first(mesh, error)
        raise
    raise_first(mesh, None)
    return value


def raise_first(mesh: Mesh, error: Exception | None) -> None:
    """Raise the error of the first rank that has one, on every rank. A collective."""
    texts = mesh.gather("" if error is None else f"{type(error).__name__}: {error}")
    for rank, text in enumerate(texts):
        if text:
            raise EvaluationError(f"rank {rank}: {text}" if len(texts) > 1 else text) from error


def task_lines(metrics: Mapping[str, float]) -> list[str]:
    """Return a line per task."""
    tasks = defaultdict[str, list[str]](list)
    for key, value in metrics.items():
        if key.startswith(PREFIX):
            name, _, metric = key.removeprefix(PREFIX).rpartition("/")
            tasks[name].append(f"{metric} {value:.6g}")
    return [f"  {name:22} {'  '.join(figures)}" for name, figures in tasks.items()]
