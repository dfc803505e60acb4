"""Plots of losses over tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING
from warnings import catch_warnings, filterwarnings

from tracking.metrics_file import centred, loss_curve, read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MANY = 40  # points, from which the start of a curve does not set the scale
WHOLE_BYTES = 4_000_000  # of metrics to read, about one step per pixel


@contextmanager
def figure(picture: Path, width: float = 8.0, plots: int = 1) -> Iterator[list["Axes"]]:
    """Yield the axes of plots, up to four per row, and save them as a PNG on exit."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = min(plots, 4)
    rows = -(-plots // columns)
    with rc_context({"text.parse_math": False}), catch_warnings():  # names may have a $; see `log_scale`
        filterwarnings("ignore", "Glyph .* missing from font")  # names in other scripts
        drawing = Figure(figsize=(width * columns, 4.5 * rows), dpi=120, layout="constrained")
        found = [drawing.add_subplot(rows, columns, n + 1, ylabel="loss (nats per token)") for n in range(plots)]
        for axes in found:
            axes.grid(alpha=0.3)
        yield found
        drawing.savefig(picture)


def log_scale(axes: "Axes") -> None:
    """Make the x axis logarithmic, with labels that are no formulas, unlike matplotlib's."""
    from matplotlib.ticker import LogFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(LogFormatter())
    axes.xaxis.set_minor_formatter(LogFormatter())


def plot_loss(metrics: Path, picture: Path) -> None:
    """Plot training loss, raw and smoothed, and validation loss; nothing for a run without steps.

    Long runs are subsampled. The first twentieth, where the loss is high, does not set the scale.
    """
    records = read_records(metrics, every=1 + metrics.stat().st_size // WHOLE_BYTES)
    train, valid = loss_curve(records, "train/loss"), loss_curve(records, "valid/loss")
    if not train:
        return
    mean = centred(train)
    with figure(picture) as (axes,):
        axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.3, linewidth=0.8, label="train")
        axes.plot(*zip(*mean, strict=True), color="tab:blue", label="train, smoothed")
        if valid:
            axes.plot(*zip(*valid, strict=True), color="tab:orange", marker="o", markersize=4, label="validation")
        shown = [loss for _, loss in mean[len(mean) // 20 :] + valid if isfinite(loss)]
        if shown and len(train) > MANY:
            margin = 0.05 * (max(shown) - min(shown)) or 0.1
            axes.set_ylim(min(shown) - margin, max(shown) + margin)
        axes.set(xlabel="tokens", title=picture.parent.name)
        axes.legend()
