"""`make demo`: from the built-in text to a model that talks, by the commands a user types, with times and memory."""

import gzip
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from conf.command import register
from conf.schema import to_config
from data.corpus import open_corpus

RUN = Path("runs/demo")
PROMPTS = ("def read_file(", "The default value is", "import ")


def say(text: str) -> None:
    print(text, flush=True)


def step(title: str, *command: str) -> float:
    """Run one command of the road, show it, and say how long it took."""
    say(f"\n=== {title}\n$ python {' '.join(command)}")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command])
    if done.returncode:
        sys.exit(done.returncode)
    seconds = time.perf_counter() - start
    say(f"    ({seconds:.0f} s)")
    return seconds
