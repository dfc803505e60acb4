"""Signals to train.py and torchrun, and the alerts of a run, from its first step to its end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import train
from launch.ranks import launch
from tests.conftest import ROOT
from tests.faults import TWO, configured, disturbed
from tracking.status import read_status
from training.checkpoint import open_checkpoint
from training.state import TrainState


@pytest.fixture
def act_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[int, Callable[[], object]]], None]]:
    """Have functions called before steps, of runs in this process; afterwards signals are as they were."""
    take, before = TrainState.take_batch, {n: signal.getsignal(n) for n in (15, signal.SIGUSR2, signal.SIGCONT)}

    def act(actions: dict[int, Callable[[], object]]) -> None:
        def take_batch(self: TrainState, **counts: int) -> None:
            actions.get(self.step + 1, lambda: None)()
            take(self, **counts)

        monkeypatch.setattr(TrainState, "take_batch", take_batch)

    yield act
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_stacks_are_written_and_the_run_goes_on(tmp_path: Path, small: list[str], act_at: Any) -> None:
    act_at({2: lambda: os.kill(os.getpid(), signal.SIGUSR1), 3: lambda: os.kill(os.getpid(), signal.SIGQUIT)})
    config = configured(tmp_path / "r", *small, "steps=4", "valid_every=0")
    launch(train.work, config, tmp_path / "r", config=config.parallel)
    log = (tmp_path / "r" / "train.log").read_text()
    first, second = (log.split("Current thread")[part].split("step ")[0] for part in (1, 2))
    assert log.count("Current thread") == 2 and log.index("Current thread") < log.index("step 4/4")
    assert all("in take_batch" in stacks for stacks in (first, second))
    assert "heartbeat.py" in log.split("step 1/4")[1], "of all threads"


def test_each_end_of_a_run_is_an_alert(
    tmp_path: Path, small: list[str], act_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that crashes, is stopped and requeued, and ends."""
    run, sent = tmp_path / "r", tmp_path / "sent"
    config = configured(run, *small, "steps=4", "valid_every=0", f"alerts.command='(cat; echo) >> {sent}'")
    act_at({2: lambda: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        train.work(config, run)
    act_at({3: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    with monkeypatch.context() as slurm, pytest.raises(SystemExit):
        slurm.setenv("SLURM_JOB_ID", "7")
        slurm.setenv("SLURM_STEP_ID", "0")
        slurm.setattr("launch.slurm.requeue", lambda _: time.sleep(0.5) or "")  # as long as Slurm takes
        train.work(config, run)
    act_at({})
    train.work(config, run)
    alerts = [json.loads(line) for line in sent.read_text().splitlines()]
    assert [(alert["state"], alert["step"]) for alert in alerts] == [
        ("crash", 1), ("stop", 3), ("requeue", 3), ("end", 4)
    ]  # fmt: skip
    assert "ZeroDivisionError" in alerts[0]["reason"] and "SIGTERM on rank 0, saved at step 3" in alerts[1]["reason"]
    assert {alert["run"] for alert in alerts} == {str(run)}


@pytest.mark.slow
def test_a_save_longer_than_the_grace_period_is_waited_for(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 36: that of train.py for its ranks, which a signal does not begin."""
    monkeypatch.setattr("launch.ranks.GRACE_S", 0.2)
    with pytest.raises(SystemExit) as stopped:
        disturbed(tmp_path / "r", "stop_and_save_slowly", [*small, "valid_every=0"])
    assert stopped.value.code == 143 and read_status(tmp_path / "r")["state"] == "stopped"
    step = open_checkpoint(tmp_path / "r").step
    assert read_status(tmp_path / "r")["reason"].endswith(f"saved at step {step}")


@pytest.mark.slow
def test_a_torchrun_that_dies_of_a_signal_leaves_no_orphans(tmp_path: Path, small: list[str]) -> None:
    """Case 34: SIGUSR2, which torchrun does not handle unless asked to; its ranks save and stop."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    settings = [*small, *TWO, "name=r", f"hydra.run.dir={tmp_path / 'r'}", "steps=100000", "valid_every=0"]
    log = tmp_path / "r" / "train.log"
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen([*torchrun, *settings], cwd=ROOT, stdout=out, stderr=out)
    ranks: list[psutil.Process] = []
    try:
        while not (log.exists() and re.search(r"step +3/", log.read_text())):
            assert process.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.1)
        ranks = psutil.Process(process.pid).children(recursive=True)
        assert len(ranks) >= 2
        process.send_signal(signal.SIGUSR2)
        assert process.wait() == -signal.SIGUSR2
        assert not psutil.wait_procs(ranks, 30)[1], "orphans"
    finally:
        for left in (process, *(rank for rank in ranks if rank.is_running())):
            left.kill()
    status = read_status(tmp_path / "r")
    assert status["state"] == "stopped" and status["stop"]["signal"] == "SIGTERM"
    assert open_checkpoint(tmp_path / "r").step >= 3
