"""What a run reports, against closed forms."""

import math

import pytest
import torch

from training.report import Throughput, loss_metrics, peak_tflops, valid_lines

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
    assert len(lines) == 3 and "bits_per_byte 0.7213" in lines[0]


def test_speed_follows_internlms_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.5, 0.6, 2.0, 10.0, 10.0, 11.0, 20.0, 20.0, 21.0, 22.0])
    monkeypatch.setattr("training.report.time.perf_counter", lambda: next(now))
    throughput = Throughput(world_size=2, internlm_flops=44.41e9, causal_flops=43.0e9, peak=312.0)
    throughput.begin()
    throughput.data_ready()
    throughput.end(16412)
    throughput.lap()
    metrics = throughput.metrics(steps_left=10)
    assert metrics["perf/tgs"] == 4103 and metrics["perf/data_wait_s"] == 0.5
    assert metrics["perf/tflops"] == pytest.approx(182.2, abs=0.05)
    assert metrics["perf/mfu"] == pytest.approx(4103 * 43.0e9 / 312e12)
    assert metrics["perf/left_s"] == 20
    for _ in range(2):  # one interval of two steps, of 1 s and 1 + 1 s
        throughput.begin()
        throughput.data_ready()
        throughput.end(3000)
    throughput.lap()
    metrics = throughput.metrics(steps_left=1)
    assert metrics["perf/tgs"] == 1000 and metrics["perf/step_s"] == 1.5 and metrics["perf/left_s"] == 5 / 3
    assert metrics["perf/tgs_all"] == pytest.approx(22412 / 5 / 2)


def test_peaks_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_tflops(torch.device("cpu")) is None
    peaks = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H200": 989, "Riva 128": None}
    for name, peak in {**peaks, "NVIDIA A800-SXM4-80GB": 312}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_tflops(torch.device("cuda", 0)) == peak
