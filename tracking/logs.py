"""Logging to the terminal and to train.log in the run folder."""

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
# Of an address: a password, which may have a slash after a scheme unless it looks like a port, or a token
PASSWORD = re.compile(
    r"(://[^/@\s:]*:(?!\d+/)(?=[^\s@\"']*@)|/[^/@\s:]*:(?=[^/\s@\"']*@)|://(?=[^/@\s:\"']+@))[^\s@]*@"
)
# Of the setting alerts.webhook: what follows the host
WEBHOOK = re.compile(r"(\bwebhook(?:[\"']?\s*[=:]\s*[\"']?|\s*\()(?:\w+://)?[^/?\s\"']*[/?])[^\s\"')\\]+")


def without_secrets(text: str) -> str:
    """Return a text with the passwords and tokens of addresses, and the path of the webhook for alerts, masked."""
    return WEBHOOK.sub(r"\1***", PASSWORD.sub(r"\1***@", text))


class _Formatter(logging.Formatter):
    """Formats log lines without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


@contextmanager
def log_to(run_dir: Path, rank: int = 0) -> Iterator[None]:
    """Print log lines and append them to train.log; other ranks print only warnings, and have their own files.

    In the context, SIGUSR1 and SIGQUIT append the stacks of all threads.
    """
    name, level = (f"train.rank{rank}.log", logging.WARNING) if rank else ("train.log", logging.INFO)
    with closing(Lines(run_dir / name)) as lines, screen(level):
        file = logging.StreamHandler(lines)
        file.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
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
    """Make stdout escape characters that the terminal's encoding lacks, instead of raising."""
    if (reconfigure := getattr(sys.stdout, "reconfigure", None)) is not None:  # not in a notebook
        reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """Escape control characters, so that untrusted text cannot control the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], text)


@contextmanager
def screen(level: int = logging.INFO) -> Iterator[None]:
    """Print log lines of this level and above."""
    escape_unprintable()
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(_Formatter())
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
    """Redirect stdout to /dev/null if its reader has closed it; re-raise any other current exception."""
    if not isinstance(sys.exc_info()[1], BrokenPipeError):
        raise
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def quiet_pipe() -> Iterator[None]:
    """Exit silently if the reader of stdout has closed it, such as `head`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        drop_stdout()
        sys.exit(141)  # 128 + SIGPIPE


def folder_command(work: Callable[[Path], object], prog: str, doc: str | None, default: str | None = None) -> None:
    """Run a command whose argument is a folder of runs; print errors without a traceback."""
    parser = argparse.ArgumentParser(description=doc, prog=f"python -m {prog}")
    shown = "of a run, or of several" + (f" (default: {default})" if default else "")
    parser.add_argument("folder", type=Path, nargs="?" if default else None, default=default, help=shown)
    escape_unprintable()
    try:
        with quiet_pipe():
            work(parser.parse_args().folder)
    except (CheckpointError, OSError) as error:
        sys.exit(without_secrets(f"error: {error}"))
