"""Print the losses and task scores of a run: python -m tracking.show runs/demo"""

import sys
from math import isfinite
from pathlib import Path

from tracking.compare import SCORE, aligned, read_runs
from tracking.logs import folder_command
from tracking.metrics_file import METRICS, read_records
from training.config import CheckpointError

MOST_POINTS = 200  # per curve


def show(run_dir: Path) -> str:
    """Return a plot of the losses over tokens and a table of validations and evaluations."""
    import plotext

    runs = read_runs(run_dir)
    if len(runs) > 1:
        raise CheckpointError(f"{run_dir} has {len(runs)} runs; name one, or python -m tracking.compare {run_dir}")
    run = runs[0]
    title = f"{run.name}: {run.state}, step {run.progress()[1]}"
    if not run.train:
        return "\n".join(line for line in (title, run.reason) if line)
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(*(plotext.terminal_size() if sys.stdout.isatty() else (100, 25)))
    train = run.train[:: len(run.train) // MOST_POINTS + 1]
    for curve, label, marker in ((train, "train, smoothed", "hd"), (run.valid, "validation", "o")):
        if points := [point for point in curve if isfinite(point[1])]:
            plotext.plot(*map(list, zip(*points, strict=True)), label=label, marker=marker)
    plotext.title(title)
    plotext.xlabel("tokens")
    drawing = plotext.build() if sys.stdout.isatty() else plotext.uncolorize(plotext.build())
    rows: dict[int, dict[str, float | None]] = {}
    for record in read_records(run.folder / METRICS):
        for key, value in record.items():
            if SCORE.fullmatch(key) or key in ("valid/loss", "valid/bits_per_byte"):
                rows.setdefault(record["step"], {})[key] = value
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    cells = [["-" if row.get(key) is None else f"{row[key]:.4f}" for key in keys] for row in rows.values()]
    lines = [[f"{step:,}", *row] for step, row in zip(rows, cells, strict=True)]
    head = ["step", *(key.removeprefix("evaluation/") for key in keys)]
    return "\n".join([drawing, "", *aligned([head, *lines])])


if __name__ == "__main__":
    folder_command(lambda folder: print(show(folder)), "tracking.show", __doc__)
