"""Spikes: finite figures of a step far above those of the steps before it."""

import math
import statistics
from collections.abc import Mapping

FIGURES = ("loss", "gradient norm")
WINDOW, LEAST = 128, 20  # logged steps that a figure is compared with, at most and at least

Recent = dict[str, list[float]]  # the figures of the last logged steps, by name


def spike_limits(recent: Recent, sigma: float) -> dict[str, float]:
    """Return `sigma` standard deviations above the mean of each figure; inf until there are enough of them."""
    known = {name: window for name, window in recent.items() if len(window) >= LEAST}
    limits = {name: statistics.fmean(window) + sigma * statistics.stdev(window) for name, window in known.items()}
    return dict.fromkeys(FIGURES, math.inf) | limits


def find_spikes(recent: Recent, figures: Mapping[str, float], sigma: float) -> list[str]:
    """Describe the figures of a step that are above their limits, and add them all to `recent`."""
    limits, found = spike_limits(recent, sigma), []
    for name, value in figures.items():
        if math.isfinite(value):
            found += [f"{name} {value:.4g}, above {limits[name]:.4g}"] if value > limits[name] else []
            recent[name] = [*recent.get(name, ()), value][-WINDOW:]
    return found
