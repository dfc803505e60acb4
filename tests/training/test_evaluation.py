"""Tasks and samples while a model trains: reported once, whatever stops or fails, and at a stated cost."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
import train
import training.scoring
from conf.schema import EvaluateConfig
from corpus.config import DataError
from data.batches import Batch
from launch.ranks import launch
from parallel.config import Device, ParallelConfig
from tests.conftest import composed, metrics, trained
from tests.faults import TWO, configured, disturbed
from tracking.status import read_status
from training.checkpoint import open_checkpoint
from training.config import Dtype
from training.evaluation import Tasks
from training.loop import Periodic
from training.preflight import check_run
from training.stop import StopRequest

QUESTIONS = [
    {"context": "import", "continuations": [" os", " sys"], "answer": 0},
    {"context": "def main(", "continuations": ["argv):", "🦄"], "answer": 0},
    {"context": "x = " * 40, "continuations": ["1", "2"], "answer": 1},
]


@pytest.fixture
def settings(small: list[str], tmp_path: Path) -> list[str]:
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    tasks = ["model.vocab_size=1000", "data.seq_len=64", f"evaluate.tasks=[{own}]", "evaluate.every=4"]
    samples = ["samples.prompts=['import', 'a | b\n']", "samples.every=5", "samples.max_new_tokens=8"]
    return [*small, *tasks, *samples]


def evaluations(folder: Path, key: str = "evaluation/own/bpb") -> dict[int, Any]:
    records = [record for record in metrics(folder) if key in record]
    assert len({record["step"] for record in records}) == len(records), "each step is evaluated once"
    return {record["step"]: record[key] for record in records}


def test_tasks_and_samples_every_n_steps(tmp_path: Path, settings: list[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    folder = tmp_path / "r"
    trained(folder, *settings, "logger=tensorboard")
    assert list(evaluations(folder)) == [4, 8, 10] and list(evaluations(folder, "samples")) == [5, 10]
    assert "2 of 6 texts of the tasks are truncated to 64 tokens" in caplog.text
    assert caplog.text.count("samples took") == 2 and caplog.text.count("of the time") == 5
    assert "own                    acc " in caplog.text

    assert (folder / "samples.md").read_text().count("\n| <code>5</code> | <code>") == 2
    first, second = evaluations(folder, "samples")[10]
    assert first["prompt"] == "import" and second["prompt"] == "a | b\n" and first["text"] != second["text"]
    assert "## <code>a &#124; b<br></code>\n" in (folder / "samples.md").read_text()
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    scores = [(event.step, event.value) for event in events.Scalars("evaluation/own/bpb")]
    assert scores == [(step, pytest.approx(value)) for step, value in evaluations(folder).items()]
    assert [event.step for event in events.Tensors("samples/text_summary")] == [5, 10]

    trained(tmp_path / "again", *settings)
    assert evaluations(tmp_path / "again", "samples") == evaluations(folder, "samples")
    config = EvaluateConfig(run=str(folder), tasks=[str(tmp_path / "own.jsonl")], dtype=Dtype.fp32, valid_tokens=0)
    found = evaluate.work(replace(config, parallel=ParallelConfig(device=Device.cpu)))
    assert found["evaluation/own/bpb"] == pytest.approx(evaluations(tmp_path / "again")[10], rel=1e-5)


def test_a_resumed_run_evaluates_once(tmp_path: Path, settings: list[str]) -> None:
    folder, often = tmp_path / "r", ["checkpoint.every=4", "checkpoint.keep=0"]
    trained(folder, *settings, *often)
    whole = metrics(folder)
    (folder / "checkpoints" / "step-00000010" / "manifest.json").unlink()  # as if killed after step 8
    trained(folder, *settings, *often)
    assert metrics(folder) == whole


@pytest.mark.parametrize("within", [False, True])
def test_stop_drops_scores(tmp_path: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch, within: bool) -> None:
    """Case 33: asked for before it, or by a signal between its batches."""
    stop, fill, filled = StopRequest(), training.scoring.fill, list[bool]()

    def asked(*args: Any) -> Batch:
        filled.append(bool(stop))
        if len(filled) == 2:
            stop.signum = signal.SIGTERM
        return fill(*args)

    before = [] if within else [Periodic(4, lambda _: stop.give_up())]
    with monkeypatch.context() as patches:
        patches.setattr(training.scoring, "fill", asked)
        trained(tmp_path / "r", *settings, "data.micro_batch_size=1", stop=stop, periodic=before)
    assert not evaluations(tmp_path / "r") and filled == [False] * 2 * within
    assert open_checkpoint(tmp_path / "r").step == 4
    trained(tmp_path / "r", *settings, "data.micro_batch_size=1")
    assert list(evaluations(tmp_path / "r")) == [4, 8, 10]


def test_failing_evaluation_is_dropped(
    tmp_path: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(Tasks, "metrics", broken)
    trained(tmp_path / "r", *settings)
    assert caplog.text.count("evaluation is dropped, training continues: ValueError: no such thing") == 1
    assert evaluations(tmp_path / "r") == {} and list(evaluations(tmp_path / "r", "samples")) == [5, 10]
    assert metrics(tmp_path / "r")[-2]["valid/loss"] > 0


@pytest.mark.parametrize(
    ("moment", "layout", "what"),
    [
        ("fill", "parallel=ddp", "evaluation"),
        pytest.param("fill", "parallel=zero3", "evaluation", marks=pytest.mark.slow),
        pytest.param("encode", "parallel=ddp", "samples", marks=pytest.mark.slow),
        pytest.param("choose", "parallel.tp=2", "samples", marks=pytest.mark.slow),
    ],
)
def test_failure_on_one_rank_is_dropped_by_all(
    tmp_path: Path, settings: list[str], moment: str, layout: str, what: str
) -> None:
    folder = tmp_path / "r"
    often = [layout, "data.micro_batch_size=1", "samples.temperature=1", "parallel.step_timeout_s=20"]
    disturbed(folder, "fail", [*settings, *often], moment=moment, n=2)  # the second time, on rank 1
    assert read_status(folder)["state"] == "finished" and metrics(folder)[-1]["step"] == 10
    logs = (folder / "train.log").read_text() + (folder / "train.rank1.log").read_text()
    assert logs.count("boom") == 1 and f"{what} is dropped, training continues: rank 1: ValueError: boom\n" in logs
    assert list(evaluations(folder)) == ([] if what == "evaluation" else [4, 8, 10])
    assert list(evaluations(folder, "samples")) == ([] if what == "samples" else [5, 10])


@pytest.mark.slow
@pytest.mark.parametrize("layout", [["parallel=zero3"], ["parallel.tp=2"]], ids=["zero3", "tp"])
def test_two_ranks_report_what_one_does(tmp_path: Path, settings: list[str], layout: list[str]) -> None:
    trained(tmp_path / "one", *settings)
    config = configured(tmp_path / "two", *TWO, *settings, "data.micro_batch_size=1", *layout)
    launch(train.work, config, tmp_path / "two", config=config.parallel)
    for key in ("evaluation/own/bpb", "evaluation/own/acc"):
        scores = evaluations(tmp_path / "one", key)
        assert list(scores) == [4, 8, 10] and evaluations(tmp_path / "two", key) == pytest.approx(scores, rel=1e-5)
    samples = evaluations(tmp_path / "one", "samples")
    assert list(samples) == [5, 10] and evaluations(tmp_path / "two", "samples") == samples


def test_max_share_skips_until_the_end(tmp_path: Path, settings: list[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    trained(
        tmp_path / "r",
        *settings,
        "evaluate.every=2",
        "evaluate.max_share=1e-6",
        "samples.prompts=[]",
        "samples.every=0",
    )
    assert list(evaluations(tmp_path / "r")) == [2, 10]
    assert caplog.text.count("(evaluate.max_share is 1e-06)") == 3


def test_bad_tasks_and_samples_are_refused(tmp_path: Path, settings: list[str]) -> None:
    config = composed(*settings)
    check_run(config, tmp_path / "r", "")
    (tmp_path / "own.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"own.jsonl, line 1"):
        check_run(config, tmp_path / "r", "")
    (problem,) = replace(config, samples=replace(config.samples, max_new_tokens=64)).problems()
    assert problem.startswith("samples.max_new_tokens")
