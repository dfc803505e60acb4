"""How good a model is: the scores of tasks, for a saved model or in the training loop."""

from collections.abc import Mapping, Sequence
from math import lcm

from data.tokenizer import Tokenizer
from parallel.engine import Engine
from training.scoring import Shape, encode, score
from training.tasks import read_task, task_metrics, task_name

PREFIX = "evaluation/"
ROW_MULTIPLE = 64  # tokens


class Tasks:
    """Tasks, read and encoded once."""

    def __init__(self, names: Sequence[str], tokenizer: Tokenizer, *, add_bos: bool) -> None:
        self.questions = {task_name(name): read_task(name) for name in names}
        every = [question for questions in self.questions.values() for question in questions]
        pairs = [pair for each in every for pair in zip(each.contexts, each.continuations, strict=True)]
        self.texts = encode(tokenizer, pairs, add_bos=add_bos)

    def shape(self, engine: Engine, batch_tokens: int) -> Shape:
        """Return batches of about so many tokens whose rows hold the longest text."""
        axes, context = engine.mesh.axes, engine.model.config.max_seq_len
        multiple, longest = lcm(ROW_MULTIPLE, axes.cp * axes.tp), max(len(text.ids) for text in self.texts)
        row_len = -(-min(longest, context + 1) // multiple) * multiple
        return Shape(max(1, batch_tokens // row_len), row_len, context)

    def n_cut(self, shape: Shape) -> int:
        """Return how many texts are longer than what the model looks at, so that it does not see their beginning."""
        return sum(len(text.ids) - 1 > min(shape.context, shape.row_len - 1) for text in self.texts)

    def metrics(self, engine: Engine, shape: Shape) -> dict[str, float]:
        """Return `evaluation/<task>/<metric>` of all tasks, scored together; a collective."""
        nll, greedy = score(engine, self.texts, shape)
        metrics, at = dict[str, float](), 0
        for name, questions in self.questions.items():
            end = at + sum(len(question.continuations) for question in questions)
            found = task_metrics(questions, nll[at:end], greedy[at:end])
            metrics |= {f"{PREFIX}{name}/{key}": value for key, value in found.items()}
            at = end
        return metrics


def task_lines(metrics: Mapping[str, float]) -> list[str]:
    """Return a line per task."""
    tasks: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        if key.startswith(PREFIX):
            name, _, metric = key.removeprefix(PREFIX).rpartition("/")
            tasks.setdefault(name, {})[metric] = value
    width = max(map(len, tasks), default=0)
    return [f"  {name:{max(width, 22)}} {'  '.join(map(_shown, its.items()))}" for name, its in tasks.items()]


def _shown(item: tuple[str, float]) -> str:
    name, value = item
    return f"{name} {value:.2%}" if name.startswith(("acc", "exact")) else f"{name} {value:.6g}"
