"""Log lines of a run: to the terminal, and with the time to train.log in its folder."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def log_to(run_dir: Path, rank: int = 0) -> Iterator[None]:
    """Append log lines to `train.log` while the context lasts, and show them; other ranks have files of their own."""
    file = logging.FileHandler(run_dir / (f"train.rank{rank}.log" if rank else "train.log"))
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    with screen(logging.WARNING if rank else logging.INFO):
        root.addHandler(file)
        try:
            yield
        finally:
            root.removeHandler(file)
            file.close()


@contextmanager
def screen(level: int = logging.INFO) -> Iterator[None]:
    """Show log lines of this level and above on the terminal while the context lasts."""
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    terminal.setLevel(level)
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.INFO)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    root.addHandler(terminal)
    try:
        yield
    finally:
        root.removeHandler(terminal)
        terminal.close()
        root.setLevel(before)
