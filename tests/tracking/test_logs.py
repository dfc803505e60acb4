"""Lines on a pipe of which the reader has gone."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PRINTS = """
from tracking.logs import quiet_pipe
with quiet_pipe():
    print('x' * 100_000)
"""
LOGS = """
import logging
from tracking.logs import screen
with screen():
    for line in range(3):
        logging.info("a line")
print("to the end")
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["-c", PRINTS], 141), (["-c", LOGS], 0), (["prepare_data.py", "--help"], 141)],
    ids=["prints", "logs", "command"],
)
def test_closed_pipe_ends_what_prints_but_not_what_logs(arguments: list[str], code: int) -> None:
    with subprocess.Popen(["true"], stdin=subprocess.PIPE) as reader:
        reader.wait()
        argv, env = [sys.executable, *arguments], {**os.environ, "PYTHONUNBUFFERED": ""}
        done = subprocess.run(argv, cwd=ROOT, env=env, stdout=reader.stdin, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (code, "")
