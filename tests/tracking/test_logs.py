"""Lines on a terminal or a pipe, of which the reader may go."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.tracking.test_compare import written

PRINTS = "from tracking.logs import quiet_pipe\nwith quiet_pipe():\n    "
LOGS = """
import logging
from tracking.logs import screen
with screen():
    for line in range(3):
        logging.info("a line")
print("to the end")
"""


def piped(*arguments: str) -> tuple[int, str]:
    """Run Python with a standard output that nobody reads; return its exit code and what it says of it."""
    with subprocess.Popen(["true"], stdin=subprocess.PIPE) as reader:
        reader.wait()
        argv = [sys.executable, *arguments]
        env = {**os.environ, "PYTHONUNBUFFERED": ""}
        done = subprocess.run(argv, cwd=ROOT, env=env, stdout=reader.stdin, stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "prints", ["print('a line')", "print('x' * 100_000)", "[print(n, flush=True) for n in (1, 2)]"]
)
def test_closed_pipe_ends_a_command_quietly(prints: str) -> None:
    assert piped("-c", PRINTS + prints) == (141, "")


def test_closed_pipe_does_not_end_what_logs() -> None:
    assert piped("-c", LOGS) == (0, "")


def test_closed_pipe_is_no_error_of_commands(tmp_path: Path) -> None:
    written(tmp_path / "a", [3.0, 2.0])
    assert piped("-m", "tracking.compare", str(tmp_path)) == (141, "")
    assert piped("prepare_data.py", "--help") == (141, "")
