"""Log lines of a run: to the terminal, and with the time to train.log in its folder."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def log_to(run_dir: Path, rank: int = 0) -> Iterator[None]:
    """Append log lines to `train.log` while the context lasts, and show them; other ranks have files of their own."""
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    if rank:
        terminal.setLevel(logging.WARNING)
    file = logging.FileHandler(run_dir / (f"train.rank{rank}.log" if rank else "train.log"))
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
