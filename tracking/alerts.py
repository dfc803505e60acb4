"""Alerts: log records with an `alert` are sent to a command or an address, one after another, in the background."""

import json
import logging
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from queue import SimpleQueue

from tracking.config import AlertsConfig
from tracking.metrics_file import last_step

LIMIT_S = 10  # for one alert

logger = logging.getLogger(__name__)


class _Sender(logging.Handler):
    def __init__(self, config: AlertsConfig, run_dir: Path) -> None:
        super().__init__()
        self.config, self.run_dir = config, run_dir

    def emit(self, record: logging.LogRecord) -> None:
        state, reason = record.alert, record.message  # type: ignore[attr-defined]
        step = last_step(self.run_dir)
        alert = {"run": str(self.run_dir), "state": state, "step": step, "reason": reason, "time": time.time()}
        try:
            self.send(json.dumps(alert))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            logger.warning("the alert %s was not sent: %s", state, error)

    def send(self, text: str) -> None:
        if self.config.command is not None:
            subprocess.run(self.config.command, shell=True, input=text.encode(), timeout=LIMIT_S, check=True)
        if self.config.webhook is not None:
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(self.config.webhook, text.encode(), headers)
            urllib.request.urlopen(request, timeout=LIMIT_S).close()


@contextmanager
def alerts(config: AlertsConfig, run_dir: Path) -> Iterator[None]:
    """Send alerts as configured; when the context ends, wait for those that are left."""
    if config.command is None and config.webhook is None:
        yield
        return
    queue = SimpleQueue()
    handler, listener = QueueHandler(queue), QueueListener(queue, _Sender(config, run_dir))
    handler.addFilter(lambda record: hasattr(record, "alert"))
    logging.root.addHandler(handler)
    listener.start()
    try:
        yield
    finally:
        logging.root.removeHandler(handler)
        listener.stop()
