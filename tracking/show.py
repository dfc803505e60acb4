"""Show a run in the terminal, its loss and what its tasks scored: python -m tracking.show runs/demo"""

import sys
from math import isfinite
from pathlib import Path

from tracking.compare import aligned, read_runs
from tracking.logs import folder_command
from tracking.metrics_file import METRICS, centred, loss_curve, read_records

MOST_POINTS = 200  # of a curve in the terminal


def show(run_dir: Path) -> str:
    """Return a plot of the losses over tokens, and a table of the validations and evaluations."""
    import plotext

    (run,) = read_runs(run_dir)[:1]
    records = read_records(run_dir / METRICS)
    curve = centred(loss_curve(records, "train/loss"))
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(*(plotext.terminal_size() if sys.stdout.isatty() else (100, 25)))
    train = curve[:: len(curve) // MOST_POINTS + 1]
    valid = [point for point in run.valid if isfinite(point[1])]
    for points, label, marker in ((train, "train, smoothed", "hd"), (valid, "validation", "o")):
        if points:
            plotext.plot(*map(list, zip(*points, strict=True)), label=label, marker=marker)
    plotext.title(f"{run.name}: {run.state}, step {run.step}/{run.config['steps']}")
    plotext.xlabel("tokens")
    drawing = plotext.build() if sys.stdout.isatty() else plotext.uncolorize(plotext.build())
    names = ("valid/loss", "valid/bits_per_byte")
    keys = [key for record in records for key in record if key in names or key.startswith("evaluation/")]
    keys = [key for key in dict.fromkeys(keys) if not key.endswith("/questions")]
    rows: dict[int, dict[str, float | None]] = {}
    for record in records:
        rows.setdefault(record["step"], {}).update({key: record[key] for key in keys if key in record})
    cells = [
        [f"{step:,}", *(f"{its[key]:.4f}" if its.get(key) is not None else "-" for key in keys)]
        for step, its in rows.items()
        if its
    ]
    head = ["step", *(key.removeprefix("evaluation/") for key in keys)]
    return "\n".join([drawing, "", *aligned([head, *cells])])


if __name__ == "__main__":
    folder_command(lambda folder: print(show(folder)), "tracking.show", __doc__)
