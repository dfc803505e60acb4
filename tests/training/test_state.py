"""Counters and requests to stop."""

import os
import signal

import pytest
import torch

from parallel.engine import count_step
from training.state import TrainState
from training.stop import StopRequest


def test_nonfinite_steps_are_counted_on_the_device() -> None:
    state = TrainState()
    for finite in (False, False, True, False, False):
        state.take_batch(samples=1, tokens=8)
        count_step(state.counts_3, torch.tensor(finite))
        assert state.sync() == (not finite)
    assert (state.nonfinite_steps, state.nonfinite_in_a_row, state.updates, state.tokens) == (4, 2, 1, 40)


def test_signals() -> None:
    """Cases 32, 34 and 35."""
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        for signum in (signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM):
            os.kill(os.getpid(), signum)
        assert not stop, "not before a step is over"
        stop.agree(7)
        assert stop and stop.exit_code == 143 and stop.for_a_requeue
    stop.saved_step = 7
    summary = stop.summary()
    assert summary["reason"] == "SIGTERM on rank 0, saved at step 7"
    assert {**summary["stop"], "time": 0} == {
        "signal": "SIGTERM", "rank": 0, "step": 7, "time": 0, "signals": 3, "exit_code": 143
    }  # fmt: skip
    assert signal.getsignal(signal.SIGTERM) is before
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        stop.agree(0)
        assert stop and stop.exit_code == 129 and not stop.for_a_requeue
    ignoring = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        stop.agree(0)
        assert not stop and not stop.summary()
    signal.signal(signal.SIGHUP, ignoring)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.exit_code == 130
        os.kill(os.getpid(), signal.SIGINT)
