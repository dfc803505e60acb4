"""Records reach every logger, whatever one of them does, and the pictures and log lines of a run."""

import json
import tracemalloc
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import trained
from tracking.config import LoggerConfig
from tracking.loggers import Logger, Loggers, Record
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


def test_picture_shows_both_curves(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(record(step)) + "\n" for step in range(1, 50)))
    plot_loss(metrics, tmp_path / "train.png")
    with metrics.open("a") as file:
        file.write(json.dumps({"step": 49, "tokens": 4900, "valid/loss": 2.0}) + '\n{"step": 50, "tok')
    plot_loss(metrics, tmp_path / "both.png")

    def orange(name: str) -> int:
        red, green, blue = (imread(tmp_path / name)[..., i] for i in range(3))
        return int(((red > 0.9) & (green > 0.4) & (green < 0.6) & (blue < 0.2)).sum())

    assert orange("train.png") == 0 and orange("both.png") > 50


def test_smoothing_starts_at_the_first_value_and_survives_a_step_without_one() -> None:
    inf = float("inf")
    assert smoothed([(1, 4.0), (2, inf), (3, 4.0)]) == [(1, pytest.approx(4.0)), (2, inf), (3, pytest.approx(4.0))]
    assert smoothed([(1, 4.0), (2, 0.0)])[1][1] == pytest.approx(4 * 0.09 / 0.19)


def test_a_centred_curve_has_no_lag() -> None:
    short, long = ([(n, 5.0 - 4 * n / length) for n in range(length)] for length in (10, 400))
    assert centred(short) == short
    apart = [[abs(mean - loss) for (_, mean), (_, loss) in zip(curve(long), long, strict=True)][40:-40]
             for curve in (centred, smoothed)]  # fmt: skip
    assert max(apart[0]) < 0.01 < 0.08 < min(apart[1])
    noisy = [(n, 5.0 + (-1) ** n) for n in range(400)]
    assert all(mean == pytest.approx(5.0, abs=0.1) for _, mean in centred(noisy)[40:-40])


@pytest.mark.parametrize(("undone", "kept"), [((), 3), (("valid/",), 2)])
def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path, undone: tuple[str, ...], kept: int) -> None:
    path, valid = tmp_path / "metrics.jsonl", {"step": 2, "valid/loss": 1.0}
    records = [record(1), record(2), {**valid, "valid/accuracy": 0.5}, record(3)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 4, "tr')
    truncate_metrics(path, 2, undone)
    assert read_records(path) == records[:kept]


@pytest.mark.slow
def test_a_picture_of_a_long_run_takes_little_memory(tmp_path: Path) -> None:
    import_module("matplotlib.figure")  # not a part of the memory
    more = ", ".join(f'"perf/figure_{n}": 12345.678901234567' for n in range(20))
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 60_001):
            file.write(f'{{"step": {step}, "tokens": {step}, "train/loss": {1e6 / step}, {more}}}\n')
            if step % 1000 == 0:
                file.write(f'{{"step": {step}, "tokens": {step}, "valid/loss": 2.5}}\nnot JSON\n')
    tracemalloc.start()
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert memory < 60e6
    drawn = read_records(tmp_path / "metrics.jsonl", every=100)
    assert sum("valid/loss" in record for record in drawn) == 60 and 600 < len(drawn) < 800
