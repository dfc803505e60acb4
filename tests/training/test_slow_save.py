"""A save that takes longer than its interval is of the step that it was begun at."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import training.checkpoint
from tests.conftest import trained
from training.checkpoint import open_checkpoint
from training.loop import Periodic, Run


@pytest.mark.slow
def test_a_save_under_way_is_not_overtaken_by_the_next(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 9: the copy in host memory, which is one, is not written over."""
    event, write = threading.Event(), training.checkpoint._write

    def held(*args: Any) -> int:
        assert event.wait(60)
        return write(*args)

    def release(run: Run) -> None:
        if run.state.step == 4:
            threading.Timer(0.3, event.set).start()  # while the run waits to save step 4

    settings = [*small, "steps=5", "checkpoint.every=2", "valid_every=0"]
    trained(tmp_path / "waits", *settings, "checkpoint.asynchronous=false")
    monkeypatch.setattr(training.checkpoint, "_write", held)
    trained(tmp_path / "r", *settings, "checkpoint.asynchronous=true", periodic=[Periodic(1, release)])
    for step in (2, 4, 5):
        saved, expected = (open_checkpoint(tmp_path / name, step=step).read("") for name in ("r", "waits"))
        assert all(torch.equal(saved[name], expected[name]) for name in expected), f"step {step}"
