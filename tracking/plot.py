"""Pictures of losses over tokens."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from math import isfinite
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, filterwarnings

from tracking.metrics_file import centred, loss_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MANY = 40  # points of a curve
HEAD = 100  # bytes of a record that hold its step, its tokens and the first loss
WHOLE_BYTES = 4_000_000  # of metrics, about as many steps as a picture has pixels


def read_drawn(path: Path) -> list[dict[str, Any]]:
    """Return the records of a run that are drawn: all validations, and of a long run every n-th step and the last."""
    every, records, last = 1 + (path.stat().st_size if path.exists() else 0) // WHOLE_BYTES, [], b""
    with path.open("rb") if path.exists() else nullcontext(()) as lines:
        for number, line in enumerate(lines):
            is_valid = line.find(b'"valid/loss"', 0, HEAD) >= 0
            last = last if is_valid else line
            if is_valid or number % every == 0:
                with suppress(ValueError):  # cut short by a kill
                    records.append(json.loads(line))
    with suppress(ValueError):
        records += [json.loads(last)] if every > 1 else []
    return sorted(records, key=itemgetter("step"))


@contextmanager
def figure(picture: Path, width: float = 8.0, plots: int = 1) -> Iterator[list["Axes"]]:
    """Yield the axes of plots, at most four in a row, which are saved as a PNG when the context ends."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = min(plots, 4)
    rows = -(-plots // columns)
    with rc_context({"text.parse_math": False}):  # a name may hold a $
        drawing = Figure(figsize=(width * columns, 4.5 * rows), dpi=120, layout="constrained")
        found = list(drawing.subplots(rows, columns, squeeze=False).flat)
        for axes in found[plots:]:
            axes.remove()
        for axes in found[:plots]:
            axes.grid(alpha=0.3)
            axes.set_ylabel("loss (nats per token)")
        yield found[:plots]
        partial = picture.with_name(f".{picture.name}")
        with catch_warnings():
            filterwarnings("ignore", "Glyph .* missing from font")  # of a name in another script
            drawing.savefig(partial, format="png")
    partial.replace(picture)


def plot_loss(metrics: Path, picture: Path) -> None:
    """Draw training loss, faint and smoothed, and validation loss; nothing for a run without steps.

    The first twentieth, where the loss falls from that of a guess, does not set the scale.
    """
    records = read_drawn(metrics)
    train, valid = loss_curve(records, "train/loss"), loss_curve(records, "valid/loss")
    if not train:
        return
    with figure(picture) as (axes,):
        axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.3, linewidth=0.8)
        mean = centred(train)
        axes.plot(*zip(*mean, strict=True) if mean else ((), ()), color="tab:blue", label="train, smoothed")
        if valid:
            axes.plot(*zip(*valid, strict=True), color="tab:orange", marker="o", markersize=4, label="validation")
        shown = [loss for _, loss in mean[len(mean) // 20 :] + valid if isfinite(loss)]
        if shown and len(train) > MANY:
            margin = 0.05 * (max(shown) - min(shown)) or 0.1
            axes.set_ylim(min(shown) - margin, max(shown) + margin)
        axes.set(xlabel="tokens", title=picture.parent.name)
        axes.legend()
