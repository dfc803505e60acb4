"""`make demo` on a smaller model: interrupted, resumed, and run again."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tracking.metrics_file import read_records

SETTINGS = (
    "steps=12", "logger.every=1", "valid_tokens=4096", "valid_every=0", "parallel.threads=2",
    "model.d_model=32", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=4", "model.d_ff=64",
)  # fmt: skip
LEFT_OUT = (".*", "__pycache__", "runs", "corpora", "exports", "tests", "docs")


def demo(checkout: Path, *, stop_in_training: bool = False) -> tuple[int, str]:
    """Run the demo as make does, in a session of its own as in a terminal; return exit code and output."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.demo", *SETTINGS],
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    metrics = checkout / "runs" / "demo" / "metrics.jsonl"
    while stop_in_training and process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.02)
    if stop_in_training:
        os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
    printed = process.communicate(timeout=500)[0]
    return process.returncode, printed


def written_files(checkout: Path) -> dict[str, tuple[int, bytes]]:
    """Return the files of corpus, checkpoints and export, with the time of their last change."""
    folders = [checkout / "corpora", checkout / "runs" / "demo" / "checkpoints", checkout / "runs" / "demo" / "hf"]
    # .begun is written at each start, to see whether it can be
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.name != ".begun"]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_resumes_and_does_nothing_twice(tmp_path: Path) -> None:
    checkout = shutil.copytree(ROOT, tmp_path / "checkout", ignore=shutil.ignore_patterns(*LEFT_OUT))

    code, printed = demo(checkout, stop_in_training=True)
    assert code == 130 and "saved runs/demo/checkpoints/" in printed and "Traceback" not in printed, printed
    assert "step 12/12" not in printed and "=== 3/4" not in printed

    code, first = demo(checkout)
    assert code == 0 and "resumed from runs/demo/checkpoints/" in first and "step 12/12" in first, first
    title, *lines = first[first.index("=== made in") :].splitlines()
    closing = {line[:18].strip(): line[18:] for line in lines}
    assert 0.1 < float(re.findall(r"peak memory (\S+) GiB", title)[0]) < 3
    records = read_records(checkout / closing["run folder"] / "metrics.jsonl")
    bits = [record["valid/bits_per_byte"] for record in records if "valid/bits_per_byte" in record]
    assert len(bits) == 1 and closing["validation text"].startswith(f"{bits[0]:.3f} bits per byte by the model, ")
    assert (checkout / closing["loss curve"]).read_bytes().startswith(b"\x89PNG")
    assert (checkout / closing["exported model"] / "model.safetensors").exists()
    samples = (checkout / closing["three samples"]).read_text()
    assert samples.count("--- prompt") == 3 and samples in first

    before, metrics = written_files(checkout), (checkout / "runs" / "demo" / "metrics.jsonl").read_text()
    code, second = demo(checkout)
    assert code == 0 and written_files(checkout) == before, second
    assert (checkout / "runs" / "demo" / "metrics.jsonl").read_text() == metrics
    for words in ("was prepared before with the same settings", "nothing is left to train", "is the export of"):
        assert words in second
    assert second.splitlines()[-6:] == first.splitlines()[-6:]
