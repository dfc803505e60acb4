"""Records reach every logger, whatever one of them does; what is printed, and the pictures of a run."""

import json
import os
import subprocess
import sys
import tracemalloc
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import ROOT, trained
from tracking.config import LoggerConfig
from tracking.loggers import Logger, Loggers, Record
from tracking.logs import without_secrets
from tracking.metrics_file import centred, read_records, smoothed, truncate_metrics
from tracking.plot import plot_loss

WANDB = {"wandb_project": "p", "wandb_entity": "team", "wandb_tags": ["a", "b"], "wandb_notes": "why"}
RUN_CONFIG = {"name": "x", "logger": WANDB, "alerts": {"webhook": "https://x/hunter2", "command": None}}


class InMemory(Logger):
    """A user's logger."""

    records: ClassVar[list[Record]] = []

    def log(self, record: Record) -> None:
        self.records.append(record)


class Failing(Logger):
    def log(self, record: Record) -> None:
        raise OSError(28, "No space left on device")


def opened(folder: Path, step: int = 0, **settings: Any) -> Loggers:
    config = LoggerConfig(**{"tensorboard": False, **settings})
    return Loggers(folder, config, run_config=RUN_CONFIG, step=step)


def record(step: int, **changes: Any) -> Record:
    return {"step": step, "tokens": 100 * step, "train/loss": 5.0 / step, **changes}


def test_a_user_logger_takes_the_records_of_a_run(tmp_path: Path, small: list[str]) -> None:
    InMemory.records.clear()
    trained(tmp_path / "r", *small, "steps=3", f"logger.extra=['{__name__}:InMemory']")
    assert [r["step"] for r in InMemory.records if "train/loss" in r] == [1, 2, 3]
    assert InMemory.records == read_records(tmp_path / "r" / "metrics.jsonl")


def test_records_reach_file_and_tensorboard_across_a_resume(tmp_path: Path) -> None:
    for first, step, end in ((5, 0, 9), (1, 0, 5), (3, 2, 5)):  # the first was killed before its first checkpoint
        with opened(tmp_path, step, tensorboard=True) as loggers:
            for i in range(first, end):
                loggers.log(record(i, **{"train/loss": float("nan") if i == 4 else float(first * 10 + i)}))
    losses = [r["train/loss"] for r in read_records(tmp_path / "metrics.jsonl")]
    assert losses == [55.0, 56.0, 57.0, 58.0, 11.0, 12.0, 13.0, None, 33.0, None]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 11.0), (2, 12.0), (3, 33.0)]


def test_wandb_is_offline_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "x")  # so that what is set below is removed in the end
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr("sys.argv", ["train.py", "alerts.webhook=https://x/hunter2"])
    with opened(tmp_path, wandb=True) as loggers:
        loggers.log(record(1, samples=[{"prompt": "a", "text": "b"}]))
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert not [path for path in run.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    (table,) = run.glob("files/media/table/samples*")
    assert json.loads(table.read_text())["data"] == [["a", "b"]]
    assert (tmp_path / "wandb_id").read_text() in run.name


def test_wandb_settings_and_run_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("wandb.init", lambda **settings: asked.append(settings) or SimpleNamespace(finish=list))
    for step in (0, 2, 0):
        with opened(tmp_path, step, wandb=True):
            monkeypatch.setattr("sys.argv", ["train.py", "alerts.webhook=https://x/hunter2"])
    assert asked[0]["config"]["alerts"] == {"webhook": "https://x/***", "command": None}
    assert [settings["settings"] for settings in asked[:2]] == [{"x_disable_meta": False}, {"x_disable_meta": True}]
    assert {f"wandb_{key}": asked[0][key] for key in ("project", "entity", "tags", "notes")} == WANDB
    assert (asked[0]["name"], asked[0]["group"]) == (tmp_path.name, "x")
    first, resumed, again = (settings["id"] for settings in asked)
    assert first == resumed != again


def test_a_failing_logger(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 39."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no network")

    broken.__name__ = "plot_loss"
    for name in ("wandb.init", "tracking.loggers.plot_loss", "torch.utils.tensorboard.writer.SummaryWriter"):
        monkeypatch.setattr(name, broken)
    InMemory.records.clear()
    extra = [f"{__name__}:Failing", f"{__name__}:InMemory"]
    with opened(tmp_path, extra=extra, tensorboard=True, wandb=True) as loggers:
        for step in (1, 2):
            loggers.log(record(step))
        loggers.plot()
    assert len(InMemory.records) == len(read_records(tmp_path / "metrics.jsonl")) == 2
    assert caplog.text.count("Failing is dropped: [Errno 28]") == 1 and caplog.text.count("is dropped") == 4
    assert all(f"{name} is dropped: no network" in caplog.text for name in ("Wandb", "plot_loss", "TensorBoard"))


def test_smoothing_starts_at_the_first_value_and_survives_a_step_without_one() -> None:
    inf = float("inf")
    assert smoothed([(1, 4.0), (2, inf), (3, 4.0)]) == [(1, pytest.approx(4.0)), (2, inf), (3, pytest.approx(4.0))]
    assert smoothed([(1, 4.0), (2, 0.0)])[1][1] == pytest.approx(4 * 0.09 / 0.19)
    falling = [(n, 5.0 - 4 * n / 400) for n in range(400)]
    assert centred(falling[:10]) == falling[:10], "a centred curve has no lag, and a short one is as it was"
    assert max(abs(mean - loss) for (_, mean), (_, loss) in zip(centred(falling), falling, strict=True)) < 0.1


def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [record(1), record(2), {"step": 2, "valid/loss": 1.0, "valid/accuracy": 0.5}, record(3)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 4, "tr')
    for undone, kept in (((), 3), (("valid/",), 2)):
        truncate_metrics(path, 2, undone)
        assert read_records(path) == records[:kept]


@pytest.mark.slow
def test_a_picture_of_a_long_run_takes_little_memory(tmp_path: Path) -> None:
    import_module("matplotlib.figure")  # not a part of the memory
    more = {f"perf/figure_{n}": 12345.678901234567 for n in range(20)}
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 60_001):
            file.write(json.dumps(record(step, **more)) + "\n")
            if step % 1000 == 0:
                file.write(f'{{"step": {step}, "tokens": {step}, "valid/loss": 2.5}}\nnot JSON\n')
    tracemalloc.start()
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert memory < 60e6
    drawn = read_records(tmp_path / "metrics.jsonl", every=100)
    assert sum("valid/loss" in record for record in drawn) == 60 and 600 < len(drawn) < 800


LOGS = """
import logging
from tracking.logs import screen
with screen():
    for line in range(3):
        logging.info("a line")
print("to the end")
"""


@pytest.mark.parametrize(
    ("arguments", "code"), [(["-c", LOGS], 0), (["prepare_data.py", "--help"], 141)], ids=["logs", "prints"]
)
def test_closed_pipe_ends_what_prints_but_not_what_logs(arguments: list[str], code: int) -> None:
    with subprocess.Popen(["true"], stdin=subprocess.PIPE) as reader:
        reader.wait()
        argv, env = [sys.executable, *arguments], {**os.environ, "PYTHONUNBUFFERED": ""}
        done = subprocess.run(argv, cwd=ROOT, env=env, stdout=reader.stdin, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("copied file://me:secret@x/far", "copied file://me:***@x/far"),
        ("//me:secret@x/far", "//me:***@x/far"),
        ("s3://key:sec/ret@bucket", "s3://key:***@bucket"),
        ("https://token@host/x", "https://***@host/x"),
        ("https://host:80/a@b c:d/e@f http://x/y@z", None),
        ("alerts.webhook (https://hooks.x/a/b) alerts.webhook=https://h/c", "alerts.webhook (https://hooks.x/***) alerts.webhook=https://h/***"),
        (json.dumps({"webhook": "https://h.x/S", "command": None}), json.dumps({"webhook": "https://h.x/***", "command": None})),
        ("saved runs/webhook/checkpoints/step-5", None),
        ("is it a webhook? yes/no", None),
    ],
)  # fmt: skip
def test_secrets_are_masked_and_nothing_else(text: str, shown: str | None) -> None:
    assert without_secrets(text) == (text if shown is None else shown)
