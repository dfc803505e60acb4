"""Alerts: log records with an `alert` attribute are sent to a command or webhook, in the background."""

import json
import logging
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tracking.config import AlertsConfig
from tracking.metrics_file import last_step

LIMIT_S = 10  # timeout of an alert

logger = logging.getLogger(__name__)


@contextmanager
def alerts(config: AlertsConfig, run_dir: Path) -> Iterator[None]:
    """Send alerts as configured; on exit, wait until all are sent."""

    if config.command is None and config.webhook is None:
        yield
        return

    def send(state: str, reason: str) -> None:
        step = last_step(run_dir)
        alert = {"run": str(run_dir), "state": state, "step": step, "reason": reason, "time": time.time()}
        text = json.dumps(alert).encode()
        try:
            if config.command is not None:
                subprocess.run(config.command, shell=True, input=text, timeout=LIMIT_S, check=True)
            if config.webhook is not None:
                request = urllib.request.Request(config.webhook, text, {"Content-Type": "application/json"})
                urllib.request.urlopen(request, timeout=LIMIT_S).close()
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            logger.warning("the alert %s was not sent: %s", state, error)

    with ThreadPoolExecutor(1, "alerts") as sender:
        handler = logging.Handler()
        handler.addFilter(lambda record: hasattr(record, "alert"))
        handler.emit = lambda record: sender.submit(send, record.alert, record.getMessage())  # type: ignore
        logging.root.addHandler(handler)
        try:
            yield
        finally:
            logging.root.removeHandler(handler)
