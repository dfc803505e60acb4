"""Alerts reach a command and a server, and a dead one holds nothing up."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.conftest import metrics, trained
from tracking.alerts import alerts
from tracking.config import AlertsConfig


@contextmanager
def server(delay_s: float = 0.0) -> Iterator[tuple[str, list[dict]]]:
    """A server of this machine; yields its address and what it was sent."""
    received: list[dict] = []
    busy = threading.Lock()

    class Take(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert busy.acquire(blocking=False), "two at a time"
            time.sleep(delay_s)
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            busy.release()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Take) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", received
        http.shutdown()


def test_alerts_are_sent_one_by_one_in_the_background(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n')
    log = logging.getLogger("test")
    with server(delay_s=0.3) as (address, received):
        config = AlertsConfig(webhook=address, command=f"cat >> {tmp_path}/sent; echo >> {tmp_path}/sent")
        with alerts(config, tmp_path):
            started = time.monotonic()
            log.warning("a line without one")
            log.warning("rank %d hangs", 3, extra={"alert": "stall"})
            log.warning("boom", extra={"alert": "crash"})
            assert time.monotonic() - started < 0.2, "training waits for none"
    assert [alert.pop("time") > 0 for alert in received] == [True, True]
    both = {"run": str(tmp_path), "step": 7}
    assert received == [
        {**both, "state": "stall", "reason": "rank 3 hangs"}, {**both, "state": "crash", "reason": "boom"}
    ]  # fmt: skip
    assert [json.loads(line)["state"] for line in (tmp_path / "sent").read_text().splitlines()] == ["stall", "crash"]


def test_an_alert_that_fails_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with alerts(AlertsConfig(command="exit 3", webhook="http://127.0.0.1:9"), tmp_path):
        logging.getLogger("test").warning("boom", extra={"alert": "crash"})
    assert "the alert crash was not sent: Command 'exit 3' returned non-zero exit status 3" in caplog.text
    assert list(AlertsConfig(webhook="ftp://x").problems())


def test_a_run_that_skips_spikes_resumes_bit_for_bit(tmp_path: Path, small: list[str]) -> None:
    """Case 43: the window that is saved with step 20 decides on step 21."""
    settings = [*small, "steps=30", "optimizer.spike_sigma=0.05", "optimizer.skip_spikes=true", "optimizer.lr=3e-3"]
    trained(tmp_path / "whole", *settings)
    (tmp_path / "stop").write_text("20")
    trained(tmp_path / "r", *settings, f"checkpoint.stop_file={tmp_path / 'stop'}")
    trained(tmp_path / "r", *settings)
    records = metrics(tmp_path / "whole")
    assert metrics(tmp_path / "r") == records
    skipped = records[-2]["train/nonfinite_steps"]
    assert 0 < skipped <= records[-2]["train/spikes"] and not any(r.get("train/nonfinite_steps") for r in records[:20])


def test_a_spike_is_reported_and_its_window_outlives_a_resume(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Case 43: the window of the first 25 steps is saved; after the resume, a loss far above it is a spike."""
    from parallel.engine import Engine

    settings = [*small, "steps=30", "optimizer.spike_sigma=6"]
    (tmp_path / "stop").write_text("25")
    trained(tmp_path / "r", *settings, f"checkpoint.stop_file={tmp_path / 'stop'}")
    train_step = Engine.train_step

    def spiked(self: Engine, batches: list) -> object:
        result = train_step(self, batches)
        result.loss = result.loss * 100
        return result

    monkeypatch.setattr(Engine, "train_step", spiked)
    trained(tmp_path / "r", *settings)
    assert "step 26 is a spike: loss 66" in caplog.text
    assert next(vars(record)["alert"] for record in caplog.records if hasattr(record, "alert")) == "spike"
    counts = [record["train/spikes"] for record in metrics(tmp_path / "r") if "train/spikes" in record]
    assert counts[24] == 0 and counts[25] == 1
