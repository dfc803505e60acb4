"""Alerts: log records with an `alert` attribute are sent to a command or webhook, in the background.

While a receiver is busy, a spike that waits gives way to any later alert; the end of a run waits for `LIMIT_S` at most.
"""

import json
import logging
import math
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tracking.config import AlertsConfig
from tracking.logs import without_secrets
from tracking.metrics_file import last_step

LIMIT_S = 10  # timeout of an alert, and of all that are not sent when the run ends

logger = logging.getLogger(__name__)


@contextmanager
def alerts(config: AlertsConfig, run_dir: Path) -> Iterator[None]:
    """Send alerts as configured, one by one."""
    if config.command is None and config.webhook is None:
        yield
        return
    waiting: list[tuple[str, str] | None] = []  # alerts, and None at the end
    changed = threading.Condition()  # of what waits; its lock is reentrant, for signal handlers that log
    busy, end = False, math.inf

    def send(state: str, reason: str) -> None:
        deadline = min(time.monotonic() + LIMIT_S, end)
        try:
            step = last_step(run_dir)
            alert = {"run": str(run_dir), "state": state, "step": step, "reason": reason, "time": time.time()}
            text = json.dumps(alert).encode()
            if config.command is not None:
                left = max(0.1, deadline - time.monotonic())
                subprocess.run(config.command, shell=True, input=text, timeout=left, check=True)
            if config.webhook is not None:
                request = urllib.request.Request(config.webhook, text, {"Content-Type": "application/json"})
                urllib.request.urlopen(request, timeout=max(0.1, deadline - time.monotonic())).close()
        except Exception as error:  # whatever a server answers
            logger.warning("the alert %s was not sent: %s", state, error)

    def send_all() -> None:
        nonlocal busy
        while True:
            with changed:
                busy = False
                changed.wait_for(lambda: waiting)
                alert, busy = waiting.pop(0), True
            if alert is None:
                return
            send(*alert)

    def add(alert: tuple[str, str] | None) -> None:
        with changed:
            last = waiting[-1] if waiting else None
            if last and last[0] == "spike" and (busy or (alert and alert[0] == "spike")):
                waiting.pop()
            waiting.append(alert)
            changed.notify()

    def emit(record: logging.LogRecord) -> None:
        add((record.alert, without_secrets(record.getMessage())))  # type: ignore

    sender = threading.Thread(target=send_all, name="alerts", daemon=True)
    sender.start()
    handler = logging.Handler()
    handler.addFilter(lambda record: hasattr(record, "alert"))
    handler.emit = emit  # type: ignore
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)
        end = time.monotonic() + LIMIT_S
        add(None)
        sender.join(LIMIT_S + 1)
        if sender.is_alive():  # such as in a look-up of the host, which has no timeout
            logger.warning("an alert was not sent within %d s", LIMIT_S)
