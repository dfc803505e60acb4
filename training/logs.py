"""Log lines of a run: to the terminal, and with the time to train.log in its folder."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def log_to(run_dir: Path) -> Iterator[None]:
    """Show log lines on the terminal and append them to `train.log` while the context lasts."""
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    file = logging.FileHandler(run_dir / "train.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    for handler in (terminal, file):
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in (terminal, file):
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)
