"""The runs of a sweep are compared in a table and two pictures, whatever became of them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from tests.conftest import ROOT
from tracking.compare import Run, as_markdown, compare, draw, read_runs, swept_keys, table
from tracking.status import Status, read_status
from training.config import CheckpointError


def written(folder: Path, losses: list[float | None], **config: object) -> Path:
    """Write a run folder with these training losses, at 100 tokens per step."""
    folder.mkdir(parents=True)
    with Status(folder, {"name": "s", "steps": 1, **config}) as status:
        records = [{"step": i, "tokens": 100 * i, "train/loss": loss} for i, loss in enumerate(losses, 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        status.end(losses[-1], stopped=False, given_up=False)
    return folder


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of all figures that are saved: loss.png's, then final.png's."""
    found: list[Axes] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (found.extend(self.axes), save(self, *a, **k)))
    return found


def test_table_shows_what_differs_the_best_first(tmp_path: Path) -> None:
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
        text = compare(tmp_path)
    assert swept_keys(read_runs(tmp_path)) == ["optimizer.lr"]
    rows = [line.split() for line in text.splitlines()]
    assert rows[0] == ["lr", "loss", "bits/byte", "tok/s/gpu", "tokens", "step", "state"]
    assert [row[0] for row in rows[1:3]] == ["0.003", "0.0001"] and rows[5][:2] == ["0.01", "-"]
    assert {(row[0], row[-1]) for row in rows[3:6]} == {("1", "failed"), ("0.1", "failed"), ("0.01", "diverged")}
    assert "lr=1: ValueError: boom" in (tmp_path / "compare" / "table.txt").read_text()
    markdown = (tmp_path / "compare" / "table.md").read_text()
    assert "| 0.003 | " in markdown and "(final.png)" in markdown
    assert (tmp_path / "compare" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(CheckpointError):
        read_runs(tmp_path / "compare")


def test_a_diverged_run_is_last_whatever_it_was_before(tmp_path: Path) -> None:
    at = {"step": 2, "tokens": 200}
    good = {**at, "valid/loss": 1.0, "valid/bits_per_byte": 0.5}
    ends = {
        "validation": [good, {**good, "valid/loss": None, "valid/bits_per_byte": None}],
        "training": [good, {**at, "train/loss": None}],
        "recovered": [{**at, "train/loss": None}, {**at, "train/loss": 2.0}, {**good, "valid/loss": 4.0}],
    }
    for seed, (name, records) in enumerate(ends.items()):
        with (written(tmp_path / name, [3.0], seed=seed) / "metrics.jsonl").open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
    rows = [line.split() for line in compare(tmp_path).splitlines()[1:4]]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("2", "4.0000", "finished"), ("1", "-", "diverged"), ("0", "-", "diverged"),
    ]  # fmt: skip
    assert rows[2][2] == "-", "the bits per byte are the last validation's"


def test_unrelated_runs_go_by_their_names(tmp_path: Path, axes: list[Axes]) -> None:
    for i in range(25):
        data = {
            f"key{n}": [i, rf"$\q{i}$", f"/a/long/path/to/a/corpus/that/is/somewhere/{i}", True][n % 4]
            for n in range(20)
        }
        written(
            tmp_path / f"我的运行_{i}_{'long' * 20}",
            [5.0, 3.0 + i],
            name=f"我的{i}",
            model={"name": f"m{i}"},
            data=data,
        )
    header, best, *_, note = compare(tmp_path).splitlines()
    assert header.split()[:2] == ["name", "model"] and len(header.split()) == 12 + 6
    assert best.split()[0] == "我的0" and "settings differ" in note
    loss, *final = axes
    legend = loss.get_legend()
    assert legend is not None and len(legend.get_texts()) == 20 and len(final) == 11
    assert max(len(text.get_text()) for text in legend.get_texts()) <= 40
    width, height = imread(tmp_path / "compare" / "final.png").shape[1::-1]
    assert width <= 2400 and height <= 2000


def test_keys_that_follow_from_a_name_are_left_out(tmp_path: Path) -> None:
    for name, width in (("tiny", 256), ("125m", 768)):
        for n_layers in (2, 4):
            model = {"name": name, "d_model": width, "n_layers": n_layers}
            written(tmp_path / f"{name}{n_layers}", [5.0], model=model, data={"seq_len": 8})
    assert swept_keys(read_runs(tmp_path)) == ["model.n_layers", "model.name"]
    assert compare(tmp_path).split()[:3] == ["n_layers", "model", "loss"]


def test_lines_join_runs_that_differ_in_one_key(tmp_path: Path, axes: list[Axes]) -> None:
    for seed in (1, 2):
        for rate in (0.1, 0.3, 0.2):
            written(tmp_path / f"{seed},{rate}", [rate + seed], seed=seed, optimizer={"lr": rate})
    compare(tmp_path)
    _, *final = axes
    grey = [[line for line in panel.lines if line.get_color() == "0.7"] for panel in final]
    lines = [[np.asarray(line.get_xdata()).tolist() for line in panel] for panel in grey]
    assert lines == [[[0.1, 0.2, 0.3]] * 2, [[1, 2]] * 3]


def test_a_sweep_without_steps_has_a_table_but_no_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (written(tmp_path / "a", [1.0]) / "metrics.jsonl").write_text("")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "status.json").write_text('{"state": "runn')
    compare(tmp_path, show=True)
    assert {path.name for path in (tmp_path / "compare").iterdir()} == {"table.md", "table.txt"}
    assert "png" not in (tmp_path / "compare" / "table.md").read_text() + capsys.readouterr().out


def test_the_table_is_printed_even_if_nothing_can_be_written(tmp_path: Path) -> None:
    written(tmp_path / "s" / "a", [1.0])
    (tmp_path / "s" / "compare").touch()
    argv = [sys.executable, "-m", "tracking.compare", tmp_path / "s"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "1.0000" in done.stdout
    assert done.stderr.startswith("error: [Errno ") and done.stderr.count("\n") == 1


def test_wide_ranges_are_drawn_on_a_log_scale(tmp_path: Path, axes: list[Axes]) -> None:
    runs = [Run(str(v), "finished", {"a": v, "b": f"x{v}", "steps": 1}, [(1, 1.0)], [], step=1) for v in (0.1, 1.0)]
    draw(runs, ["a", "b"], tmp_path)
    assert [panel.get_xscale() for panel in axes] == ["linear", "log", "linear"], "tokens, a factor of ten, words"
    assert as_markdown(table(runs, ["b"])).splitlines()[2].startswith("| x0.1 | 1.0000 | - | - | 1 | 1/1 | finished |")
