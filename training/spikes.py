"""Spikes: finite figures of a step far above those of the steps before it."""

import math
import statistics
from collections.abc import Mapping

WINDOW, LEAST = 128, 20  # logged steps that a figure is compared with, at most and at least


def find_spikes(recent: dict[str, list[float]], figures: Mapping[str, float], sigma: float) -> list[str]:
    """Describe the figures more than `sigma` standard deviations above the mean of `recent`; add them all to it."""
    found = []
    for name, value in figures.items():
        window = recent.setdefault(name, [])
        if not math.isfinite(value):
            continue
        if len(window) >= LEAST:
            mean, deviation = statistics.fmean(window), statistics.stdev(window)
            if value > mean + sigma * deviation:
                found.append(f"{name} {value:.4g}, after {mean:.4g} ± {deviation:.2g}")
        window.append(value)
        del window[:-WINDOW]
    return found
