"""What may pass is tried again with growing waits, and then raised as it was."""

import errno
import os
from collections.abc import Callable

import pytest

from tracking import retry
from tracking.retry import PASSING, retried
from training.config import CheckpointError
from training.ranks import Ranks


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    made: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", made.append)
    return made


def failing(number: int, times: int) -> Callable[[], str]:
    left = iter([number] * times)

    def step() -> str:
        for found in left:
            raise OSError(found, os.strerror(found), "manifest.json")
        return "done"

    return step


NAMES = ["ESTALE", "EIO", "EMFILE", "ENFILE", "ETIMEDOUT", "EAGAIN", "ENOENT", "EACCES", "EPERM"]


@pytest.mark.parametrize("name", NAMES)
def test_an_error_that_may_pass_is_tried_again(name: str, waits: list[float], caplog: pytest.LogCaptureFixture) -> None:
    number = getattr(errno, name)
    assert retried(failing(number, 4)) == "done" and waits == [0.1, 0.4, 1.5, 4.0]
    assert caplog.text.count(os.strerror(number)) == 4
    with pytest.raises(CheckpointError, match=os.strerror(number)):
        Ranks().on_first(failing(number, 5))
    assert len(waits) == 8


def test_an_error_that_stays_is_raised_at_once(waits: list[float]) -> None:
    assert {getattr(errno, name) for name in NAMES} == PASSING
    for number in (errno.ENOSPC, errno.EROFS):
        with pytest.raises(OSError, match=os.strerror(number)):
            retried(failing(number, 1))
    assert not waits
