"""Detection of spikes in loss and gradient norm."""

import math
import statistics
from collections.abc import Mapping

FIGURES = ("loss", "gradient norm")
WINDOW, LEAST = 128, 20  # logged steps to compare with, at most and at least

Recent = dict[str, list[float]]  # figures of the last logged steps, by name


def spike_limits(recent: Recent, sigma: float) -> dict[str, float]:
    """Return the mean plus `sigma` standard deviations of each figure; inf until there are enough."""
    known = {name: window for name, window in recent.items() if len(window) >= LEAST}
    limits = {name: statistics.fmean(window) + sigma * statistics.stdev(window) for name, window in known.items()}
    return dict.fromkeys(FIGURES, math.inf) | limits


def find_spikes(recent: Recent, figures: Mapping[str, float], sigma: float) -> list[str]:
    """Describe the figures that are above their limits; add all to `recent`, spikes as their limits.

    So a spike hides no later one, and with a `sigma` of 2 or more a lasting shift is soon none.
    """
    limits, found = spike_limits(recent, sigma), []
    for name, value in figures.items():
        if math.isfinite(value):
            found += [f"{name} {value:.4g}, above {limits[name]:.4g}"] if value > limits[name] else []
            recent[name] = [*recent.get(name, ()), min(value, limits[name])][-WINDOW:]
    return found
