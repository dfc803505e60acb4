"""What is printed: on a pipe of which the reader has gone, and without secrets."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tracking.logs import without_secrets

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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("copied file://me:secret@x/far", "copied file://me:***@x/far"),
        ("//me:secret@x/far", "//me:***@x/far"),
        ("s3://key:sec/ret@bucket", "s3://key:***@bucket"),
        ("https://token@host/x", "https://***@host/x"),
        ("https://host:80/a@b c:d/e@f http://x/y@z", None),
        ("alerts.webhook (https://hooks.x/a/b) alerts.webhook=https://h/c", "alerts.webhook (https://hooks.x/***) alerts.webhook=https://h/***"),
        (json.dumps({"webhook": "https://h.x/S", "command": None}), json.dumps({"webhook": "https://h.x/***", "command": None})),
        ("saved runs/webhook/checkpoints/step-5", None),
        ("is it a webhook? yes/no", None),
    ],
)  # fmt: skip
def test_secrets_are_masked_and_nothing_else(text: str, shown: str | None) -> None:
    assert without_secrets(text) == (text if shown is None else shown)
