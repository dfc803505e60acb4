"""Runs are compared, listed and shown in the terminal, whatever became of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from tracking.compare import compare, read_runs, swept_keys
from tracking.list import list_runs
from tracking.show import show
from tracking.status import Status, read_status
from training.config import CheckpointError


def written(folder: Path, losses: list[float | None], *more: dict, **config: object) -> Path:
    """Write a run folder with these training losses, at 100 tokens per step, and more records after the steps."""
    folder.mkdir(parents=True)
    with Status(folder, {"name": "s", "steps": 1, **config}) as status:
        steps = [{"step": i, "train/loss": loss} for i, loss in enumerate(losses, 1)]
        records = [{"tokens": 100 * record["step"], **record} for record in [*steps, *more]]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        status.end(losses[-1] if losses else None, stopped=False, given_up=False)
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
    page = (tmp_path / "compare" / "table.md").read_text()
    assert text in page and "lr=1: ValueError: boom" in page and "(final.png)" in page
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
        written(tmp_path / name, [3.0], *records, seed=seed)
    rows = [line.split() for line in compare(tmp_path).splitlines()[1:4]]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("2", "4.0000", "finished"), ("1", "-", "diverged"), ("0", "-", "diverged"),
    ]  # fmt: skip
    assert rows[2][2] == "-", "the bits per byte are the last validation's"


def test_training_and_validation_losses_are_not_ranked_together(tmp_path: Path) -> None:
    for seed, validated in enumerate([{"valid/loss": 3.0}, {}]):
        written(tmp_path / str(seed), [2.0], {"step": 1, **validated}, seed=seed)
    _, *rows, note = compare(tmp_path).splitlines()
    assert [row.split()[:2] for row in rows] == [["0", "3.0000"], ["1", "2.0000*"]] and note[0] == "*"
    assert "2.0000*" in list_runs(tmp_path) and note in list_runs(tmp_path)


def test_unrelated_runs_go_by_their_names(tmp_path: Path, axes: list[Axes]) -> None:
    for i in range(25):
        values = [i, rf"$\q{i}$", f"/a/long/path/to/a/corpus/that/is/somewhere/{i}", True]
        config = {"name": f"我的{i}", "model": {"name": f"m{i}"}, "data": {f"key{n}": values[n % 4] for n in range(20)}}
        written(tmp_path / f"我的运行_{i}_{'long' * 20}", [5.0, 3.0 + i], **config)
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
            written(tmp_path / f"{name}{n_layers}", [], model=model, data={"seq_len": 8})
    assert swept_keys(read_runs(tmp_path)) == ["model.n_layers", "model.name"]
    assert compare(tmp_path).split()[:3] == ["n_layers", "model", "loss"]
    assert [path.name for path in (tmp_path / "compare").iterdir()] == ["table.md"], "nothing to draw without steps"


def test_lines_of_a_key_without_numbers_are_named(tmp_path: Path, axes: list[Axes]) -> None:
    for name, rate in ((name, rate) for name in ("adamw", "muon") for rate in (0.1, 0.2)):
        written(tmp_path / f"{name},{rate}", [rate], optimizer={"name": name, "lr": rate})
    compare(tmp_path)
    legends = [{text.get_text() for text in panel.get_legend().get_texts()} for panel in axes[1:]]  # type: ignore[union-attr]
    assert legends == [{"lr 0.1", "lr 0.2"}, {"optimizer adamw", "optimizer muon"}]


def test_lines_join_runs_that_differ_in_one_key(tmp_path: Path, axes: list[Axes]) -> None:
    for seed in (1, 2):
        for rate in (0.1, 1.0, 0.2):
            written(tmp_path / f"{seed},{rate}", [rate + seed], seed=seed, optimizer={"lr": rate})
    compare(tmp_path)
    _, *final = axes
    xdata = [[np.asarray(line.get_xdata()).tolist() for line in panel.lines] for panel in final]
    assert [[x for x in panel if len(x) > 1] for panel in xdata] == [[[0.1, 0.2, 1.0]] * 2, [[1, 2]] * 3]
    rings = [[line for line in panel.lines if line.get_fillstyle() == "none"] for panel in final]
    assert [[float(np.asarray(ring.get_xdata())[0]) for ring in panel] for panel in rings] == [[0.1] * 2, [1] * 3]
    legends = [[text.get_text() for text in panel.get_legend().get_texts()] for panel in final]  # type: ignore[union-attr]
    assert legends == [["seed 1", "seed 2"], ["lr 0.1", "lr 0.2", "lr 1"]]
    assert [panel.get_xscale() for panel in final] == ["log", "linear"], "a factor of ten, and of two"
    ticks = [tick.get_text() for tick in final[0].get_xticklabels()]
    assert "1" in ticks and not any("$" in tick for tick in ticks), "formulas are not drawn, for names may have a $"


def test_what_follows_from_the_swept_settings_has_no_plot(tmp_path: Path, axes: list[Axes]) -> None:
    for width in (64, 128):
        for rate in (0.1, 0.2):
            model = {"d_model": width, "d_ff": 3 * width, "n_heads": width // 64}
            name = f"model.d_model={width},optimizer.lr={rate}"
            written(tmp_path / name, [rate + width], model=model, optimizer={"lr": rate})
    assert "n_heads" in compare(tmp_path), "it is in the table"
    _, *final = axes
    assert [panel.get_xlabel() for panel in final] == ["lr", "d_model"]
    legends = [[text.get_text() for text in panel.get_legend().get_texts()] for panel in final]  # type: ignore[union-attr]
    assert legends == [["d_model 64", "d_model 128"], ["lr 0.1", "lr 0.2"]]


def test_a_run_is_plotted_with_its_evaluations(tmp_path: Path) -> None:
    scores = [
        {"step": 500, "valid/loss": 3.25, "valid/loss/en": 3.0},
        {"step": 500, "evaluation/own/acc": 0.5, "evaluation/own/questions": 3.0},
        {"step": 1000, "evaluation/own/acc": None},
    ]
    text = show(written(tmp_path / "r", [float(np.exp(-i / 100)) for i in range(1000)], *scores))
    assert "r: finished, step 1000/1" in text and "train, smoothed" in text and "validation" in text
    table = [line.split() for line in text.splitlines()[-3:]]
    assert table == [["step", "valid/loss", "own/acc"], ["500", "3.2500", "0.5000"], ["1,000", "-", "-"]]
    assert show(tmp_path).splitlines()[-3:] == text.splitlines()[-3:], "the only run in a folder"
    written(tmp_path / "s", [4.0])
    with pytest.raises(CheckpointError, match="2 runs"):
        show(tmp_path)


def test_a_run_without_steps_is_shown_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="boom"), Status(tmp_path, {"steps": 1}):
        raise ValueError("boom")
    assert show(tmp_path) == f"{tmp_path.name}: failed, step 0/1\nValueError: boom"


def test_all_runs_are_listed_the_last_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("a", 360.0), ("b", 720.0)):
        folder = written(tmp_path / name, [4.0], {"step": 4, "perf/step_s": seconds, "valid/loss": 3.5})
        (folder / ".hydra").mkdir()
        (folder / ".hydra" / "overrides.yaml").write_text(f"- name={name}\n- ++data.mix.code=3\n")
    header, last, first = (line.split() for line in list_runs(tmp_path).splitlines())
    assert header == ["run", "state", "loss", "tokens", "step", "hours", "started", "with"]
    assert last == ["b", "finished", "3.5000", "400", "4/1", "0.80", "name=b", "data.mix.code=3"]
    assert first[0] == "a" and first[5] == "0.40"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    assert {len(line) for line in list_runs(tmp_path).splitlines()} == {40}


def test_a_comparison_has_the_scores_of_tasks_and_draws_mixtures(tmp_path: Path, axes: list[Axes]) -> None:
    for code in (1.0, 3.0):
        losses = {"valid/loss": 3.0, "valid/loss/code": 4 - code, "valid/loss/Wiki (en)": code}
        score = {"evaluation/own/acc": code / 4, "evaluation/own/exact_match": 1.5, "evaluation/own/questions": 9.0}
        records = [{"step": 1, **losses}, {"step": 1, **score}]
        written(tmp_path / f"code={code}", [3.0], *records, data={"mix": {"code": code, "wiki_en": 1.0}})
    header, first, _ = (line.split("  ") for line in compare(tmp_path).splitlines())
    assert [cell.strip() for cell in header if cell][:5] == ["code", "loss", "bits/byte", "own acc", "own exact_match"]
    assert [cell.strip() for cell in first if cell][3:5] == ["0.2500", "1.5000"]
    lines = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in axes[-1].lines}
    assert lines == {"code": [[0.5, 3.0], [0.75, 1.0]], "Wiki (en)": [[0.25, 3.0], [0.5, 1.0]]}
    assert "(mix.png)" in (tmp_path / "compare" / "table.md").read_text()
