"""Alerts reach a command and a server, and a dead one holds nothing up; spikes are skipped and reported."""

import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from launch.ranks import GRACE_S
from tests.conftest import metrics, trained
from tracking.alerts import LIMIT_S, alerts
from tracking.config import AlertsConfig
from tracking.status import CAUSE_S
from training.config import OptimizerConfig
from training.spikes import LASTING, WINDOW, Recent, find_spikes


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def test_alerts_are_sent_one_by_one_in_the_background(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n')
    log, received, busy = logging.getLogger("test"), [], threading.Lock()

    class Take(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert busy.acquire(blocking=False), "two at a time"
            time.sleep(0.3)
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            busy.release()

    with HTTPServer(("127.0.0.1", 0), Take) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        command = f"cat >> {tmp_path}/sent; echo >> {tmp_path}/sent"
        with alerts(AlertsConfig(webhook=f"http://127.0.0.1:{http.server_port}", command=command), tmp_path):
            log.warning("a line without one")
            log.warning("rank %d hangs", 3, extra={"alert": "stall"})
            wait_for(tmp_path / "sent")
            log.warning("boom", extra={"alert": "crash"})
            assert not received, "training waits for none"
        http.shutdown()
    assert [alert.pop("time") > 0 for alert in received] == [True, True]
    both = {"run": str(tmp_path), "step": 7}
    assert received == [
        {**both, "state": "stall", "reason": "rank 3 hangs"}, {**both, "state": "crash", "reason": "boom"}
    ]  # fmt: skip
    assert [json.loads(line)["state"] for line in (tmp_path / "sent").read_text().splitlines()] == ["stall", "crash"]


def test_a_spike_that_waits_gives_way_and_no_other_alert(tmp_path: Path) -> None:
    log, sent = logging.getLogger("test"), tmp_path / "sent"
    slow = f"cat >> {sent}; echo >> {sent}; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done"
    with alerts(AlertsConfig(command=slow), tmp_path):
        for number in range(20):
            log.warning("%d", number, extra={"alert": "spike"})
            wait_for(sent)
        for state in ("stall", "stall", "spike", "crash"):
            log.warning("%s", "https://me:hunter2@x", extra={"alert": state})
        (tmp_path / "go").touch()
    found = [json.loads(line) for line in sent.read_text().splitlines()]
    assert [alert["state"] for alert in found] == ["spike", "stall", "stall", "crash"]
    assert [alert["reason"] for alert in found] == ["0", *["https://me:***@x"] * 3]


def test_a_quick_receiver_gets_every_alert_whatever_it_answers(tmp_path: Path) -> None:
    received = []

    class Odd(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["state"])
            self.wfile.write(b"hello\r\n\r\n")  # no HTTP

    states = ["spike", "stall", "crash", "requeue"]
    with HTTPServer(("127.0.0.1", 0), Odd) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        with alerts(AlertsConfig(webhook=f"http://127.0.0.1:{http.server_port}"), tmp_path):
            for state in states:
                logging.getLogger("test").warning("boom", extra={"alert": state})
                time.sleep(0.2)
        http.shutdown()
    assert received == states


def test_a_receiver_that_hangs_holds_the_end_up_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tracking.alerts.LIMIT_S", 2)
    begun = time.monotonic()
    with alerts(AlertsConfig(command="exec sleep 600"), tmp_path):
        for state in ["spike"] * 18 + ["crash", "requeue"]:
            logging.getLogger("test").warning("boom", extra={"alert": state})
    assert time.monotonic() - begun < 20 and "alerts" not in {thread.name for thread in threading.enumerate()}
    assert "the alert requeue was not sent: Command 'exec sleep 600' timed out" in caplog.text


def test_ranks_are_given_time_for_the_alert_of_another_ranks_failure() -> None:
    assert GRACE_S > CAUSE_S + LIMIT_S + 1


def test_an_alert_that_fails_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with alerts(AlertsConfig(command="exit 3"), tmp_path):
        logging.getLogger("test").warning("boom", extra={"alert": "crash"})
    assert "the alert crash was not sent: Command 'exit 3' returned non-zero exit status 3" in caplog.text


def test_a_spike_window_outlives_a_resume(tmp_path: Path, small: list[str], caplog: pytest.LogCaptureFixture) -> None:
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
    assert "spike" in {vars(record).get("alert") for record in caplog.records}


def test_a_spike_hides_no_smaller_one_and_a_lasting_shift_is_learned() -> None:
    recent: Recent = {"loss": [3 + 0.05 * (-1) ** n for n in range(WINDOW)]}
    for value in (1e9, 1e8, 50.0):
        assert find_spikes(recent, {"loss": value}, 6), value
    assert not find_spikes(recent, {"loss": 3.05}, 6) and max(recent["loss"]) < 4
    shifted = [bool(find_spikes(recent, {"loss": 5 + 0.05 * (-1) ** n}, 6)) for n in range(WINDOW)]
    assert shifted == [True] * LASTING + [False] * (WINDOW - LASTING)
    assert find_spikes(recent, {"loss": 9.0}, 6), "and what is usual then"
    assert OptimizerConfig().max_nonfinite_steps > LASTING
    same: Recent = {"loss": [0.0] * WINDOW}
    assert [bool(find_spikes(same, {"loss": 1.0}, 6)) for _ in range(9)] == [True] * LASTING + [False] * 4
