"""evaluate.py: the validation split and tasks of a run, one of its checkpoints, and a Hugging Face folder."""

import json
import shutil
from pathlib import Path

import pytest

import evaluate
from conf.schema import EvaluateConfig
from model.config import ModelError
from parallel.config import Device, ParallelConfig
from tests.conftest import exported, metrics, ran, trained
from tracking.run_folder import locked
from training.checkpoint import open_checkpoint
from training.config import Dtype

QUESTIONS = [
    {"context": "import", "continuations": [" os", " sys", " xyz"], "answer": 0},
    {"context": "def main(", "continuations": ["argv):", "🦄"], "answer": 0},
    {"text": "The quick brown fox\n" * 9},
    {"context": "x =", "continuations": [" 1"]},
]


@pytest.fixture
def done(tmp_path_factory: pytest.TempPathFactory, small: list[str], tmp_path: Path) -> Path:
    """A finished run whose vocabulary is not padded, so that it is scored as in training and as exported."""
    run_dir = tmp_path_factory.getbasetemp() / "unpadded"
    if not run_dir.exists():
        trained(run_dir, *small, "model.vocab_size=1000")
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return shutil.copytree(run_dir, tmp_path / "done")


def settings(done: Path, **changes: object) -> EvaluateConfig:
    parallel = ParallelConfig(device=Device.cpu)
    tasks = [str(done.parent / "own.jsonl")]
    return EvaluateConfig(**{"run": str(done), "tasks": tasks, "parallel": parallel, "dtype": Dtype.fp32, **changes})  # type: ignore[arg-type]


def test_run_and_export_score_as_in_training(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = metrics(done)
    (valid,) = [record for record in before if "valid/loss" in record]
    found = evaluate.work(settings(done))
    assert valid.keys() < found.keys() | {"step", "tokens"}
    losses = {key: value for key, value in valid.items() if key.startswith("valid/")}
    assert {key: found[key] for key in losses} == pytest.approx(losses, rel=1e-6)
    printed = capsys.readouterr().out
    assert "valid code" in printed and f"bpb {found['evaluation/own/bpb']:.6g}" in printed
    assert json.loads((done / "evaluation.json").read_text()) == {"10": found}
    *others, last = metrics(done)
    assert others == before[:-1] and last == {**found, **valid}
    evaluate.work(settings(done, valid_tokens=128))
    assert metrics(done)[-1] == last, "a part of the split is not the run's validation"

    exported(done, done / "hf")
    of_export = evaluate.work(settings(done, run=None, hf=str(done / "hf")))
    assert of_export == pytest.approx({key: value for key, value in found.items() if key.startswith("evaluation/")})
    assert json.loads((done / "hf" / "evaluation.json").read_text()) == {"": of_export}


def test_run_and_export_score_alike_on_a_corpus(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, corpus = metrics(done), str(open_checkpoint(done).state["config"]["data"]["path"])
    found = evaluate.work(settings(done, tasks=[], corpus=corpus))
    assert {"valid/loss", "valid/loss/code", "valid/bits_per_byte"} < found.keys()
    own = evaluate.work(settings(done, tasks=[]))
    assert found == pytest.approx(own, rel=1e-6), "the run's own corpus, in rows as it was trained"
    assert metrics(done) == before, "it is not the run's validation"
    exported(done, done / "hf")
    of_export = evaluate.work(settings(done, run=None, hf=str(done / "hf"), tasks=[], corpus=corpus, seq_len=32))
    assert of_export == pytest.approx(found, rel=1e-5)
    assert json.loads((done / "hf" / "evaluation.json").read_text()) == {corpus: of_export}
    monkeypatch.setattr("training.preflight.fits", lambda *_: False)
    with pytest.raises(ModelError, match="another tokenizer"):
        evaluate.work(settings(done, tasks=[], corpus=corpus))


def test_evaluation_on_two_ranks_of_a_run_in_use(done: Path) -> None:
    own = f"{done.parent}/own.jsonl"
    command = ["evaluate.py", f"run={done}", "step=10", f"tasks=[builtin,{own}]", "valid_tokens=128"]
    layout = ["parallel=zero3", "parallel.dp_shard=2", "parallel.device=cpu", "dtype=fp32"]
    before = metrics(done)
    with locked(done):
        ended = ran(*command, *layout)
    assert "not in metrics.jsonl" in ended.stdout and metrics(done) == before
    found = json.loads((done / "evaluation.json").read_text())["10"]
    assert found["evaluation/builtin/questions"] >= 300 and 0 <= found["evaluation/builtin/acc"] <= 1
    alone = evaluate.work(settings(done, valid_tokens=0))
    assert {key: found[key] for key in alone} == pytest.approx(alone, rel=1e-5)
    assert json.loads((done / "evaluation.json").read_text())["10"] == {**found, **alone}, "one checkpoint's are merged"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("", "run and hf"), ("hf=x", "nothing to evaluate"), ("run=x step=3 tasks=[nope]", "no checkpoint in x"),
        ("run={run} tasks=[nope]", "task nope is not known"), ("run={run} parallel.dp_shard=2", "zero_stage"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_named(done: Path, argv: str, named: str) -> None:
    from tests.test_cli import problems

    assert named in "\n".join(problems(*argv.format(run=done).split(), command="evaluate"))
