"""Log lines of a run: on the terminal, and with the time in train.log in its folder."""

import argparse
import faulthandler
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tracking.run_folder import Lines
from training.config import CheckpointError

STACK_SIGNALS = (signal.SIGUSR1, signal.SIGQUIT)


@contextmanager
def log_to(run_dir: Path, rank: int = 0) -> Iterator[None]:
    """Show log lines and append them to train.log; other ranks show only warnings and have files of their own.

    Until the context ends, SIGUSR1 and SIGQUIT append the stacks of all threads.
    """
    name, level = (f"train.rank{rank}.log", logging.WARNING) if rank else ("train.log", logging.INFO)
    with closing(Lines(run_dir / name)) as lines, screen(level):
        file = logging.StreamHandler(lines)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.root.addHandler(file)
        for signum in STACK_SIGNALS:
            faulthandler.register(signum, lines.file.fileno())
        try:
            yield
        finally:
            for signum in STACK_SIGNALS:
                faulthandler.unregister(signum)
            logging.root.removeHandler(file)


def escape_unprintable() -> None:
    """Have standard output escape the characters that the terminal's encoding lacks; Python would raise."""
    if (reconfigure := getattr(sys.stdout, "reconfigure", None)) is not None:  # a notebook's has none
        reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """Return a text of others for a terminal, which control characters in it could command."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], text)


@contextmanager
def screen(level: int = logging.INFO) -> Iterator[None]:
    """Show log lines of this level and above on the terminal."""
    escape_unprintable()
    terminal = logging.StreamHandler(sys.stdout)
    terminal.handleError = drop_stdout  # the lines are in train.log too
    terminal.setLevel(level)
    terminal.addFilter(lambda record: not hasattr(record, "file_only"))
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    before = logging.root.level
    logging.root.setLevel(logging.INFO)
    logging.root.addHandler(terminal)
    try:
        yield
    finally:
        logging.root.removeHandler(terminal)
        logging.root.setLevel(before)


def drop_stdout(record: object = None) -> None:
    """Go on in silence where the reader of standard output has gone; raise another error that is being handled."""
    if not isinstance(sys.exc_info()[1], BrokenPipeError):
        raise
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def quiet_pipe() -> Iterator[None]:
    """End without a word where the reader of standard output has gone, as `head` does."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        drop_stdout()
        sys.exit(141)  # as a shell reports what ends by SIGPIPE


def folder_command(work: Callable[[Path], object], prog: str, doc: str | None, default: str | None = None) -> None:
    """Run a command whose argument is the folder of a run or of several; print an error without a traceback."""
    parser = argparse.ArgumentParser(description=doc, prog=f"python -m {prog}")
    parser.add_argument("folder", type=Path, nargs="?" if default else None, default=default, help="such as runs/demo")
    escape_unprintable()
    try:
        with quiet_pipe():
            work(parser.parse_args().folder)
    except (CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
