"""A run folder belongs to one process and one configuration."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tracking.run_folder import (
    StopFile,
    changed_keys,
    locked,
    refuse_changes,
    refuse_early,
    truncate_metrics,
)
from training.config import CheckpointConfig, CheckpointError, TrainingError
from training.state import TrainState, check_bad_steps
from training.stop import StopRequest

ROOT = Path(__file__).parent.parent.parent


def test_a_folder_in_use_is_refused_with_its_owner(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from tracking.run_folder import locked\nwith locked(Path(sys.argv[1])): pass"
    with locked(tmp_path / "run"):
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True
        )
        assert f"is in use by process {os.getpid()} on" in other.stderr and other.returncode
    again = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], cwd=ROOT)
    assert again.returncode == 0


OLD = {
    "steps": 10,
    "optimizer": {"lr": 0.1, "decay": "all"},
    "logger": {"every": 1},
    "data": {"seed": 1, "workers": 2},
}


def test_every_changed_key_is_told_with_the_way_out() -> None:
    new = {
        "steps": 20,
        "optimizer": {"lr": 0.2, "decay": "all"},
        "logger": {"every": 5},
        "data": {"seed": 1, "workers": 0},
    }
    assert list(changed_keys(OLD, new)) == [
        ("data.workers", 2, 0), ("logger.every", 1, 5), ("optimizer.lr", 0.1, 0.2), ("steps", 10, 20),
    ]  # fmt: skip
    with pytest.raises(CheckpointError) as error:
        refuse_changes(OLD, new, [], Path("runs/x"))
    assert str(error.value) == (
        "runs/x was begun with another configuration: optimizer.lr (0.1, now 0.2), steps (10, now 20); pass another "
        "name= for a new run, or checkpoint.accept_changes=[optimizer.lr,steps] to go on all the same"
    )
    with pytest.raises(CheckpointError, match=r"accept_changes=\[steps\]"):
        refuse_changes(OLD, new, ["optimizer"], Path("runs/x"))
    refuse_changes(OLD, new, ["optimizer.lr", "steps"], Path("runs/x"))


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("3", {2: (False, False), 3: (True, True), 4: (False, True)}),
        ("-3", {2: (False, False), 3: (True, False), 4: (False, False)}),
    ],
)
def test_a_stop_file_names_a_step_to_save_at(tmp_path: Path, text: str, answers: dict) -> None:
    (tmp_path / "stop").write_text(f"{text}\n")
    stop = StopFile(str(tmp_path / "stop"))
    assert {step: stop.read(step) for step in answers} == answers
    assert StopFile(None).read(3) == StopFile(str(tmp_path / "none")).read(3) == (False, False)


def test_a_stop_file_of_nonsense_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "stop").write_text("soon")
    stop = StopFile(str(tmp_path / "stop"))
    assert [stop.read(step) for step in (1, 2)] == [(False, False)] * 2
    assert caplog.text.count("holds 'soon', which is no step") == 1


def test_metrics_past_the_checkpoint_and_half_a_line_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"step": 1}, {"step": 2}, {"step": 2, "valid/loss": 1.0}, {"step": 3}]
    text = "".join(json.dumps(record) + "\n" for record in records) + '{"step": 4, "tr'
    for validated, kept in ((True, records[:3]), (False, records[:2])):
        path.write_text(text)
        truncate_metrics(path, 2, validated=validated)
        assert [json.loads(line) for line in path.read_text().splitlines()] == kept


def test_signals_set_a_flag_and_a_second_interrupt_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop and stop.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.exit_code == 130
        os.kill(os.getpid(), signal.SIGINT)


def test_bad_steps_end_a_run_only_when_they_come_in_a_row() -> None:
    progress = TrainState()
    for counts, bad in (((0, 1, 1), 1), ((0, 2, 2), 1), ((1, 2, 0), 0), ((1, 4, 2), 2)):
        progress.take(samples=1, tokens=8)
        assert progress.read(counts) == bad
        if bad:
            check_bad_steps(progress, 3, lambda: "blocks.1.mlp")
    assert (progress.nonfinite_steps, progress.nonfinite_in_a_row, progress.updates, progress.tokens) == (4, 2, 1, 32)
    assert progress.read((1, 5, 3)) == 1
    with pytest.raises(TrainingError, match=r"3 steps in a row .* first in blocks.1.mlp"):
        check_bad_steps(progress, 3, lambda: "blocks.1.mlp")


def test_another_configuration_or_model_is_refused_before_any_device_is_touched(tmp_path: Path) -> None:
    shape = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64}
    stored: dict[str, Any] = {
        "seed": 0,
        "model": {**shape, "attention_bias": False, "tie_embeddings": False, "rope_theta": 1e4, "norm_eps": 1e-5},
        "init_from": None,
    }
    state = tmp_path / "old" / "checkpoints" / "step-00000003" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"config": stored}))
    wider = {**stored, "model": {**stored["model"], "d_model": 64, "n_layers": 3}, "init_from": str(tmp_path / "old")}
    refuse_early(tmp_path / "old", stored, CheckpointConfig())
    refuse_early(tmp_path / "new", {**wider, "model": stored["model"]}, CheckpointConfig())
    with pytest.raises(CheckpointError, match=r"model.d_model \(32, now 64\), model.n_layers \(2, now 3\)"):
        refuse_early(tmp_path / "old", wider, CheckpointConfig())
    with pytest.raises(
        CheckpointError, match=r"step-00000003 is of another model: model.d_model \(32, now 64\), model"
    ):
        refuse_early(tmp_path / "new", wider, CheckpointConfig())
    state.write_text("{")
    refuse_early(tmp_path / "old", wider, CheckpointConfig())  # for whoever verifies it to say
