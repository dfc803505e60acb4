"""Detection of spikes in loss and gradient norm."""

import math
import statistics
from collections.abc import Mapping

FIGURES = ("loss", "gradient norm")
WINDOW, LEAST = 128, 20  # logged steps to compare with, at most and at least
LASTING = 5  # spikes in a row that are a new level

Recent = dict[str, list[float]]  # by name: figures of the last logged steps, and spikes in a row


def spike_limits(recent: Recent, sigma: float) -> dict[str, float]:
    """Return the mean plus `sigma` standard deviations of each figure; inf until there are enough."""
    known = {name: recent[name] for name in FIGURES if len(recent.get(name, ())) >= LEAST}
    limits = {name: statistics.fmean(window) + sigma * statistics.stdev(window) for name, window in known.items()}
    return dict.fromkeys(FIGURES, math.inf) | limits


def find_spikes(recent: Recent, figures: Mapping[str, float], sigma: float) -> list[str]:
    """Describe the figures that are above their limits; add the others to `recent`.

    A spike does not count, so that it hides no later one; after `LASTING` in a row the window starts anew with them.
    """
    limits, found = spike_limits(recent, sigma), []
    for name, value in figures.items():
        if not math.isfinite(value):
            continue
        window, row = recent.get(name, []), recent.get(f"{name}, spikes in a row", [])
        if value > limits[name]:
            found.append(f"{name} {value:.4g}, above {limits[name]:.4g}")
            row = [*row, value]
            window, row = (row, []) if len(row) == LASTING else (window, row)
        else:
            window, row = [*window, value][-WINDOW:], []
        recent |= {name: window, f"{name}, spikes in a row": row}
    return found
