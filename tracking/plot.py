"""Pictures of losses over tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tracking.metrics_file import loss_curve, read_records, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@contextmanager
def figure(picture: Path, width: float = 8.0, columns: int = 1) -> Iterator[list["Axes"]]:
    """Yield the axes of a row of plots, which is saved as a PNG when the context ends."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, 4.5), dpi=120, layout="constrained")
    row = list(drawing.subplots(1, columns, squeeze=False)[0])
    for axes in row:
        axes.grid(alpha=0.3)
        axes.set_ylabel("loss (nats per token)")
    yield row
    partial = picture.with_name(f".{picture.name}")
    drawing.savefig(partial, format="png")
    partial.replace(picture)


def plot_loss(metrics: Path, picture: Path) -> None:
    """Draw training loss, faint and smoothed, and validation loss; nothing for a run without steps."""
    records = read_records(metrics)
    train, valid = loss_curve(records, "train/loss"), loss_curve(records, "valid/loss")
    if not train:
        return
    with figure(picture) as (axes,):
        axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.3, linewidth=0.8)
        axes.plot(*zip(*smoothed(train), strict=True), color="tab:blue", label="train, smoothed")
        if valid:
            axes.plot(*zip(*valid, strict=True), color="tab:orange", marker="o", markersize=4, label="validation")
        axes.set(xlabel="tokens", title=picture.parent.name)
        axes.legend()
