"""What may pass is tried again with growing waits, and then raised as it was."""

import errno

import pytest

from tracking.retry import retried
from training.config import CheckpointError
from training.ranks import Ranks


def test_errors_that_may_pass_are_tried_again_and_others_raised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("tracking.retry.time.sleep", waits.append)

    def failing(number: int, times: int) -> str:
        if len(waits) < times:
            raise OSError(number, "manifest.json")
        return "done"

    assert retried(lambda: failing(errno.ESTALE, 4)) == "done" and waits == [0.1, 0.4, 1.5, 4.0]
    waits.clear()
    with pytest.raises(CheckpointError, match="manifest.json"):
        Ranks().on_first(lambda: failing(errno.EACCES, 5))
    assert len(waits) == 4
    with pytest.raises(OSError, match="manifest.json"):
        retried(lambda: failing(errno.ENOSPC, 5))
    assert len(waits) == 4
