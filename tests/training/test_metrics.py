"""Figures against closed forms, and the places they are written to."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tracking.config import LoggerConfig
from tracking.loggers import Loggers
from tracking.logs import log_to
from tracking.plot import plot_loss, smoothed
from training.metrics import Throughput, duration, loss_metrics, peak_tflops, step_line, valid_lines

TOTALS = [[6.0, 3.0, 4.0, 12.0], [2.0, 1.0, 4.0, 4.0], [0.0, 0.0, 0.0, 0.0]]


def test_losses_are_token_weighted_over_sources_and_for_each() -> None:
    metrics = loss_metrics(TOTALS, ("code", "en", "none"), "valid")
    assert metrics["valid/loss"] == 1.0 and metrics["valid/loss/code"] == 1.5 and metrics["valid/loss/en"] == 0.5
    assert metrics["valid/perplexity"] == pytest.approx(math.e)
    assert metrics["valid/accuracy"] == 0.5 and metrics["valid/accuracy/en"] == 0.25
    assert metrics["valid/bits_per_byte"] == pytest.approx(8 / 16 / math.log(2))
    assert metrics["valid/bits_per_byte/en"] == pytest.approx(0.5 / math.log(2))
    assert not any(key.endswith("/none") for key in metrics)
    lines = valid_lines(metrics, ("code", "en", "none"))
    assert len(lines) == 3 and "bits/byte 0.7213" in lines[0]


def test_a_loss_beyond_reason_has_a_finite_perplexity() -> None:
    assert math.isfinite(loss_metrics([[1e9, 0.0, 1.0, 1.0]], ("a",), "train")["train/perplexity"])


def test_speed_follows_internlms_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.0, 0.5, 2.0, 10.0, 10.0, 14.0])
    monkeypatch.setattr("training.metrics.time.perf_counter", lambda: next(now))
    clock = Throughput(world_size=2, internlm_flops=44.41e9, causal_flops=43.0e9, peak=312.0)
    clock.begin()
    clock.data_ready()
    clock.end(16412)
    metrics = clock.metrics(steps_left=10)
    assert metrics["perf/tgs"] == 4103 and metrics["perf/data_wait_s"] == 0.5
    assert metrics["perf/tflops"] == pytest.approx(182.2, abs=0.05)
    assert metrics["perf/mfu"] == pytest.approx(4103 * 43.0e9 / 312e12)
    assert metrics["perf/left_s"] == 20
    clock.begin()
    clock.data_ready()
    clock.end(8000)
    metrics = clock.metrics(steps_left=0)
    assert metrics["perf/tgs"] == 1000 and metrics["perf/tgs_all"] == pytest.approx(24412 / 6 / 2)


def test_a_device_without_a_known_peak_has_no_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_tflops(torch.device("cpu")) is None
    names = {
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H200": 989,
        "NVIDIA A800-SXM4-80GB": 312,
        "Riva 128": None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_tflops(torch.device("cuda", 0)) == peak


def record(step: int, **changes: object) -> dict:
    base = {
        "step": step, "tokens": 100 * step, "train/loss": 5.0 / step, "train/grad_norm": 0.5, "optim/lr": 1e-4,
        "perf/tgs": 4103.4, "perf/tflops": 182.2, "perf/mfu": 0.56, "perf/memory_gib": 61.3, "perf/left_s": 7384.0,
    }  # fmt: skip
    return {**base, **changes}


def test_the_step_line_has_one_width() -> None:
    lines = [
        step_line(record(step, **changes), 20000)
        for step, changes in (
            (1, {}),
            (19999, {"perf/mfu": None, "train/grad_norm": 123.4, "perf/left_s": 3.0}),
            (7, {"perf/left_s": 9e5}),
        )
    ]
    assert lines[0] == (
        "step     1/20000  loss  5.0000  grad      0.5  lr 1.00e-04     4,103 tok/s/gpu   182.20 TFLOP/s  "
        "mfu  56.0%  mem  61.3GiB  left  2h03m"
    )
    assert len({len(line) for line in lines}) == 1


def test_durations_are_written_as_people_do() -> None:
    assert [duration(s) for s in (3.4, 125, 7384, 180000)] == ["3s", "2m05s", "2h03m", "2d02h"]


def test_records_reach_the_file_and_tensorboard_through_a_resume(tmp_path: Path) -> None:
    for first, step in ((1, 0), (3, 2)):
        with Loggers(tmp_path, LoggerConfig(), run_config={"name": "x"}, step=step) as sinks:
            for i in range(first, 5):
                sinks.write(record(i, **{"train/loss": float("nan") if i == 4 else float(first * 10 + i)}))
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["train/loss"] for r in written] == [11.0, 12.0, 13.0, None, 33.0, None]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 11.0), (2, 12.0), (3, 33.0)]


def test_wandb_runs_offline_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for key in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    for _ in range(2):
        config = LoggerConfig(tensorboard=False, wandb=True)
        with Loggers(tmp_path, config, run_config={"name": "x"}, step=0) as sinks:
            sinks.write(record(1))
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    run_id = (tmp_path / "wandb_id").read_text()
    assert runs and all(run_id in path.name for path in runs)
    monkeypatch.delenv("WANDB_MODE", raising=False)


def test_a_full_disk_for_tensorboard_does_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with Loggers(tmp_path, LoggerConfig(), run_config={"name": "x"}, step=0) as sinks:
        writer = sinks.tensorboard
        assert writer is not None
        writer.add_scalar = full
        sinks.write(record(1))
        sinks.write(record(2))
        writer.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert caplog.text.count("TensorBoard is left") == 1


def test_displays_that_fail_in_any_way_do_not_stop_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr("wandb.init", broken)
    monkeypatch.setattr("tracking.loggers.plot_loss", broken)
    monkeypatch.setattr("torch.utils.tensorboard.writer.SummaryWriter", broken)
    with Loggers(tmp_path, LoggerConfig(wandb=True), run_config={"name": "x"}, step=0) as sinks:
        sinks.write(record(1))
        sinks.plot()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert [f"{name} is left: no network" in caplog.text for name in ("wandb", "loss.png", "TensorBoard")] == [True] * 3


def test_the_picture_shows_both_curves(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(record(step)) + "\n" for step in range(1, 50)))
    plot_loss(metrics, tmp_path / "train.png")
    with metrics.open("a") as file:
        file.write(json.dumps({"step": 49, "tokens": 4900, "valid/loss": 2.0}) + "\n")
    plot_loss(metrics, tmp_path / "both.png")
    train, both = imread(tmp_path / "train.png"), imread(tmp_path / "both.png")
    assert train.shape[:2] == both.shape[:2] == (540, 960)

    def orange(picture: object) -> int:
        red, green, blue = (picture[..., i] for i in range(3))  # type: ignore[index]
        return int(((red > 0.9) & (green > 0.4) & (green < 0.6) & (blue < 0.2)).sum())

    assert orange(train) == 0 and orange(both) > 50


def test_smoothing_starts_at_the_first_value() -> None:
    assert smoothed([4.0] * 5) == pytest.approx([4.0] * 5)
    assert smoothed([4.0, 0.0])[1] == pytest.approx(4 * 0.09 / 0.19)


def test_log_lines_go_to_the_terminal_and_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number in (1, 2):
        with log_to(tmp_path):
            logging.getLogger("x").info("line %d", number)
    logging.getLogger("x").info("line 3")
    assert capsys.readouterr().out == "line 1\nline 2\n"
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split("INFO ")[1] for line in lines] == ["line 1", "line 2"]
