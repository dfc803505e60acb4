"""What came out of several runs is told in one table and two pictures, whatever became of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tracking.compare import Run, as_markdown, compare, draw, read_runs, swept_keys, table
from tracking.status import Status, read_status
from training.config import CheckpointError


def written(folder: Path, losses: list[float | None], **config: object) -> Path:
    """A run folder with these training losses, of 100 tokens a step."""
    folder.mkdir(parents=True)
    with Status(folder, {"name": "s", "steps": 1, **config}) as status:
        records = [{"step": i, "tokens": 100 * i, "train/loss": loss} for i, loss in enumerate(losses, 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        status.end(losses[-1], stopped=False, given_up=False)
    return folder


def test_a_comparison_shows_what_differs_the_best_first_whatever_the_state(tmp_path: Path) -> None:
    for rate, losses in {1e-4: [5.0, 4.0], 3e-3: [5.0, 3.0], 1e-2: [5.0, None]}.items():
        written(tmp_path / f"lr={rate}", losses, optimizer={"lr": rate, "beta1": 0.9}, logger={"every": rate})
    crashed = written(tmp_path / "lr=1", [5.0], optimizer={"lr": 1.0, "beta1": 0.9})
    with pytest.raises(ValueError, match="boom"), Status(crashed, read_status(crashed)["config"]):
        with (crashed / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "tokens": 200}\n')
        raise ValueError("boom\nand more")
    running = written(tmp_path / "lr=0.1", [5.0], optimizer={"lr": 0.1, "beta1": 0.9})
    with Status(running, read_status(running)["config"]), (running / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "tok')  # being written
        told = compare(tmp_path)
    assert swept_keys(read_runs(tmp_path)) == ["optimizer.lr"]
    rows = [line.split() for line in told.splitlines()]
    assert rows[0] == ["lr", "loss", "bits/byte", "tok/s/gpu", "tokens", "step", "state"]
    assert rows[1][0] == "0.003" and rows[2][0] == "0.0001" and rows[1][-1] == "finished"
    assert {(row[0], row[-1]) for row in rows[3:]} == {("0.01", "finished"), ("1", "failed"), ("0.1", "failed")}
    assert "lr=1: ValueError: boom" in (tmp_path / "compare" / "table.txt").read_text()
    markdown = (tmp_path / "compare" / "table.md").read_text()
    assert "| 0.003 | " in markdown and "![final loss](final.png)" in markdown
    assert (tmp_path / "compare" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(CheckpointError, match="there is no run in"):
        read_runs(tmp_path / "compare")


def test_a_model_is_told_by_its_name_and_not_by_every_number_that_goes_with_it(tmp_path: Path) -> None:
    for name, width in (("tiny", 256), ("125m", 768)):
        for n_layers in (2, 4):
            model = {"name": name, "d_model": width, "n_layers": n_layers}
            written(tmp_path / f"{name}{n_layers}", [5.0], model=model, data={"seq_len": 8})
    assert swept_keys(read_runs(tmp_path)) == ["model.n_layers", "model.name"]
    assert compare(tmp_path).split()[:3] == ["n_layers", "model", "loss"]


def test_a_line_of_final_losses_joins_runs_that_differ_in_its_value_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[list[list[float]]] = []
    for seed in (1, 2):
        for rate in (0.1, 0.3, 0.2):
            written(tmp_path / f"{seed},{rate}", [rate + seed], seed=seed, optimizer={"lr": rate})
    monkeypatch.setattr(
        "tracking.compare._save",
        lambda figure, path: (
            lines.extend([line.get_xdata().tolist() for line in axes.lines] for axes in figure.axes)
            if path.name == "final.png"
            else None
        ),
    )
    compare(tmp_path)
    assert lines == [[[0.1, 0.2, 0.3]] * 2, [[1, 2]] * 3]


def test_a_sweep_without_a_step_has_a_table_and_no_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "a", [1.0])
    compare(tmp_path)
    (tmp_path / "a" / "metrics.jsonl").write_text("")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "status.json").write_text('{"state": "runn')
    compare(tmp_path, tell=True)
    assert {path.name for path in (tmp_path / "compare").iterdir()} == {"table.md", "table.txt"}
    assert "png" not in (tmp_path / "compare" / "table.md").read_text() and "png" not in capsys.readouterr().out


def test_what_can_be_read_but_not_written_beside_is_still_told(tmp_path: Path) -> None:
    written(tmp_path / "s" / "a", [1.0])
    (tmp_path / "s" / "compare").touch()
    argv = [sys.executable, "-m", "tracking.compare", tmp_path / "s"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "1.0000" in done.stdout
    assert done.stderr.startswith("error: [Errno ") and done.stderr.count("\n") == 1


def test_final_losses_stand_over_a_rate_on_a_logarithmic_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scales = []
    runs = [
        Run(str(v), "finished", {"a": v, "b": f"x{v}", "steps": 1}, [(1, 1.0)], [], 1, None, None, "")
        for v in (0.1, 1.0)
    ]
    monkeypatch.setattr(
        "tracking.compare._save", lambda figure, _: scales.extend(axes.get_xscale() for axes in figure.axes)
    )
    draw(runs, ["a", "b"], tmp_path)
    assert scales == ["linear", "log", "linear"], "tokens, a factor of ten, words"
    assert as_markdown(*table(runs, ["b"])).splitlines()[2].startswith("| x0.1 | 1.0000 | - | - | 1 | 1/1 | finished |")
