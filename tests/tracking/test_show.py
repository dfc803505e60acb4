"""One run in the terminal, all runs in a list, and evaluations beside the losses of a comparison."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from tests.tracking.test_compare import axes, written  # noqa: F401
from tracking.compare import compare
from tracking.config import EarlyStopConfig
from tracking.early_stop import is_hopeless
from tracking.list import list_runs
from tracking.metrics_file import centred, last_value
from tracking.show import show


def scored(folder: Path, losses: list[float | None], *more: dict, **config: object) -> Path:
    """Write a run whose records after the steps are these."""
    written(folder, losses, **config)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps({"tokens": 100 * record["step"], **record}) + "\n" for record in more))
    return folder


def test_a_run_is_plotted_with_its_evaluations(tmp_path: Path) -> None:
    scores = [
        {"step": 500, "valid/loss": 3.25, "valid/loss/en": 3.0}, {"step": 500, "evaluation/own/acc": 0.5, "evaluation/own/questions": 3.0},
        {"step": 1000, "evaluation/own/acc": None},
    ]  # fmt: skip
    text = show(scored(tmp_path / "r", [float(np.exp(-i / 100)) for i in range(1000)], *scores))
    assert "r: finished, step 1000/1" in text and "train, smoothed" in text and "validation" in text
    table = [line.split() for line in text.splitlines()[-3:]]
    assert table == [["step", "valid/loss", "own/acc"], ["500", "3.2500", "0.5000"], ["1,000", "-", "-"]]


def test_all_runs_are_listed_the_last_first(tmp_path: Path) -> None:
    for name, seconds in (("a", 360.0), ("b", 720.0)):
        folder = scored(tmp_path / name, [4.0], {"step": 4, "perf/step_s": seconds, "valid/loss": 3.5})
        (folder / ".hydra").mkdir()
        (folder / ".hydra" / "overrides.yaml").write_text(f"- name={name}\n- optimizer.lr=1e-3\n")
    header, last, first = (line.split() for line in list_runs(tmp_path).splitlines())
    assert header == ["run", "state", "step", "loss", "tokens", "hours", "started", "with"]
    assert last == ["b", "finished", "4/1", "3.5000", "400", "0.80", "name=b", "optimizer.lr=1e-3"]
    assert first[0] == "a" and first[5] == "0.40"


def test_a_comparison_has_the_scores_of_tasks_and_draws_mixtures(tmp_path: Path, axes: list[Axes]) -> None:  # noqa: F811
    for code in (1.0, 3.0):
        losses = {"valid/loss": 3.0, "valid/loss/code": 4 - code, "valid/loss/en": code}
        score = {"evaluation/own/acc": code / 4, "evaluation/own/bpb": 1.5, "evaluation/own/questions": 9.0}
        records = [{"step": 1, **losses}, {"step": 1, **score}]
        scored(tmp_path / f"code={code}", [3.0], *records, data={"mix": {"code": code, "en": 1.0}})
    header, *rows = (line.split("  ") for line in compare(tmp_path).splitlines())
    assert [cell.strip() for cell in header if cell][:5] == ["code", "loss", "bits/byte", "own acc", "own bpb"]
    assert sorted(cell.strip() for row in rows for cell in row if cell in ("0.2500", "0.7500") or "0.2500" in cell)
    lines = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in axes[-1].lines}
    assert lines == {"code": [[0.5, 3.0], [0.75, 1.0]], "en": [[0.25, 3.0], [0.5, 1.0]]}
    assert "(mix.png)" in (tmp_path / "compare" / "table.md").read_text()


def test_early_stop_and_objective_take_any_metric(tmp_path: Path) -> None:
    for name, acc in (("good", 0.9), ("bad", 0.2)):
        scored(tmp_path / name, [1.0], {"step": 2, "evaluation/own/acc": acc})
    good, bad = tmp_path / "good", tmp_path / "bad"
    rule = EarlyStopConfig(margin=0.5, after_step=1, every=1, metric="-evaluation/own/acc")
    assert is_hopeless(rule, bad, 2) and not is_hopeless(rule, good, 2)
    assert last_value(bad, "evaluation/own/acc") == 0.2 and last_value(bad, "-evaluation/own/acc") == -0.2
    assert last_value(bad, "evaluation/none/acc") is None


@pytest.mark.parametrize("n", [1, 2, 10, 1000])
def test_the_smoothed_curve_has_no_lag(n: int) -> None:
    line = [(i, 5.0 - i / n) for i in range(n)]
    smooth = centred([*line, (n, float("inf"))])
    np.testing.assert_allclose(smooth, line, err_msg="a straight line stays where it is")
    noise = [(i, float(i % 2)) for i in range(n)]
    assert n < 1000 or np.std([loss for _, loss in centred(noise)][50:-50]) < 0.05
