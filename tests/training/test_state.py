"""Counters, requests to stop, and the garbage collector between steps."""

import gc
import os
import signal
import weakref

import pytest
import torch

from training.loop import garbage_collection_paused
from training.state import TrainState
from training.stop import StopRequest


def test_nonfinite_steps_are_counted_on_the_device() -> None:
    state = TrainState()
    for finite in (False, False, True, False, False):
        state.take_batch(samples=1, tokens=8)
        state.counters.add(torch.tensor(finite))
        assert state.sync() == (not finite)
    assert (state.nonfinite_steps, state.nonfinite_in_a_row, state.updates, state.tokens) == (4, 2, 1, 40)


def test_state_dict_round_trip_reaches_the_device() -> None:
    state = TrainState(step=7, samples=28, updates=5, nonfinite_steps=2, nonfinite_in_a_row=1, valid_loss=2.5)
    again = TrainState()
    again.load_state_dict(state.state_dict())
    assert again.counters.read() == (5, 2, 1) and again.state_dict() == state.state_dict()
    again.counters.add(torch.tensor(True))
    assert again.sync() == 0 and (again.updates, again.nonfinite_in_a_row) == (6, 0)
    assert TrainState(valid_loss=float("nan")).state_dict()["valid_loss"] is None


def test_signals_set_a_flag_and_a_second_interrupt_stops_at_once() -> None:
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


class Ring:
    """Something that only the collector can free."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_is_collected_only_when_asked() -> None:
    assert gc.isenabled()
    with garbage_collection_paused():
        found = [weakref.ref(Ring()) for _ in range(5000)]  # many times what starts a collection
        assert all(ref() is not None for ref in found) and not gc.isenabled()
        gc.collect(1)
        assert all(ref() is None for ref in found)
    assert gc.isenabled() and gc.get_freeze_count() == 0
