"""The process that writes checkpoints shares memory with the trainer, reports its errors, and does not outlive it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from training.checkpoint import _write_items
from training.writer_process import WriterProcess

SURVIVOR = """
import time
from training.writer_process import WriterProcess
process = WriterProcess(8)
print(process.process.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def writer() -> Iterator[WriterProcess]:
    writer = WriterProcess(1024)
    yield writer
    writer.close()


def test_tensors_in_the_block_are_shared_and_others_copied(writer: WriterProcess) -> None:
    shared, other = writer.block[16:48].view(torch.float32).view(2, 4), torch.ones(3)
    shared.fill_(1.0)
    assert torch.equal(writer.call(torch.Tensor.mul_, shared, 3.0), torch.full((2, 4), 3.0))
    assert torch.equal(writer.call(torch.Tensor.mul_, other, 3.0), torch.full((3,), 3.0))
    assert shared.eq(3.0).all() and other.eq(1.0).all() and not writer.block[:16].any() and not writer.block[48:].any()


def test_errors_come_back(writer: WriterProcess, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        writer.call(os.rename, tmp_path / "missing", tmp_path / "other")
    assert caught.value.errno == 2
    with pytest.raises(AttributeError):
        writer.call(_write_items, tmp_path, None, {})
    assert writer.call(sum, [1, 2]) == 3


def test_a_killed_process_is_an_error_and_starts_again(writer: WriterProcess) -> None:
    with pytest.raises(OSError, match="died"):
        writer.call(signal.raise_signal, signal.SIGKILL)
    writer.block.fill_(7)
    assert int(writer.call(torch.Tensor.sum, writer.block)) == 7 * 1024


def test_it_ends_with_a_killed_trainer() -> None:
    with subprocess.Popen([sys.executable, "-c", SURVIVOR], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        pid = int(trainer.stdout.readline())
        trainer.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.1)
