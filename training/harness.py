"""An adapter of lm-evaluation-harness (pip install lm-eval) to our models, in any parallel layout."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate  # type: ignore[import-not-found]
from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found]
from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]
from torch import Tensor

from data.tokenizer import Tokenizer
from parallel.engine import Engine
from training.config import TrainingError
from training.evaluation import PREFIX
from training.scoring import Encoded, extend, fitting_shape, score

MAX_GEN_TOKS = 256  # the harness's default


class HarnessModel(TemplateLM):
    """A model for the harness, which sees one rank: every rank gets all requests."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, add_bos: bool, batch_tokens: int) -> None:
        super().__init__()
        self.engine, self.text, self.batch_tokens = engine, tokenizer, batch_tokens
        self.bos = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_id or 0

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.text.bos_id is None else self.text.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return [*(self.bos if add_special_tokens is not False else []), *self.text.encode(string)]

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        pairs = [(given, new) for _, given, new in requests]
        return self._score([Encoded(np.array([*given, *new], dtype=np.int32), len(given)) for given, new in pairs])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        whole = [[self.prefix_token_id, *self.tok_encode(request.args[0])] for request in requests]
        return [loglik for loglik, _ in self._score([Encoded(np.array(ids, dtype=np.int32), 1) for ids in whole])]

    def _score(self, texts: list[Encoded]) -> list[tuple[float, bool]]:
        scores = score(self.engine, texts, fitting_shape(self.engine, texts, self.batch_tokens))
        return [(-nll, greedy) for nll, greedy in zip(*scores, strict=True)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue texts greedily."""
        if any(request.args[1].get("do_sample") for request in requests):
            raise TrainingError("harness tasks with do_sample are not supported; generation is greedy")
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        stops = [until if isinstance(until := r.args[1].get("until") or [], list) else [until] for r in requests]
        limits = [request.args[1].get("max_gen_toks", MAX_GEN_TOKS) for request in requests]

        def choose(number: int, new: list[int], logits_V: Tensor) -> int | None:
            text = self.text.decode(new)
            token = int(logits_V[: self.text.vocab_size].argmax())
            ends = len(new) == limits[number] or any(stop in text for stop in stops[number])
            return None if ends or token == self.text.eos_id else token

        most = min(max(limits), self.engine.model.config.max_seq_len - 1)
        slots = [Encoded(np.array([*prompt, *[0] * most], dtype=np.int32), len(prompt)) for prompt in prompts]
        shape = fitting_shape(self.engine, slots, self.batch_tokens)
        new = extend(self.engine, prompts, shape, max_new_tokens=most, choose=choose)
        texts = [self.text.decode(ids) for ids in new]
        ends = [[at for stop in stop if (at := text.find(stop)) >= 0] for text, stop in zip(texts, stops, strict=True)]
        return [text[: min(found, default=None)] for text, found in zip(texts, ends, strict=True)]


def harness_metrics(model: HarnessModel, tasks: Sequence[str]) -> dict[str, float]:
    """Return `evaluation/<task>/<metric>` of harness tasks, given by name or as YAML files; a collective."""
    files = [Path(task) for task in tasks if task.endswith(".yaml")]
    texts = [file.read_text(encoding="utf-8") for file in files]
    names = [found[1] for text in texts if (found := re.search(r"^task: *[\"']?([^\s\"']+)", text, re.M))]
    names += [task for task in tasks if not task.endswith(".yaml")]
    manager = TaskManager(include_path=[str(file.parent) for file in files] or None)
    run: Any = simple_evaluate  # a decorator hides its type
    results = run(model, tasks=names, task_manager=manager, log_samples=False, bootstrap_iters=0) or {}
    return {
        f"{PREFIX}{task}/{key.removesuffix(',none')}": value
        for task, metrics in results.get("results", {}).items()
        for key, value in metrics.items()
        if isinstance(value, int | float) and "," in key and "stderr" not in key
    }
