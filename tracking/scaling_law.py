"""Fit and extrapolate the losses of a ladder of models: python -m tracking.scaling_law runs/ladder.

L(N, D) = E + A / N^a + B / D^b (Hoffmann et al. 2022, arXiv:2203.15556), N being the parameters of blocks and head, D
the tokens of the run. Where D / N is the same in all runs, as in a ladder, the two terms are one: L(N) = E + A / N^a.
Writes scaling_law.md and scaling_law.png beside the runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from conf.ladder import n_params
from tracking.compare import read_runs
from tracking.logs import folder_command
from tracking.plot import figure
from training.config import CheckpointError

EXPONENTS = np.geomspace(0.03, 1.5, 120)


class Point(NamedTuple):
    n_params: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class Law:
    """floor + sum of factor / size^exponent; a factor is 0 where its size does not vary by itself."""

    floor: float
    of_params: tuple[float, float]  # factor, exponent
    of_tokens: tuple[float, float] = (0.0, 1.0)

    def loss(self, n_params: float, tokens: float) -> float:
        (a, alpha), (b, beta) = self.of_params, self.of_tokens
        return self.floor + a / n_params**alpha + b / tokens**beta

    def __str__(self) -> str:
        (a, alpha), (b, beta) = self.of_params, self.of_tokens
        return f"L = {self.floor:.4g} + {a:.4g} / N^{alpha:.3f}" + (f" + {b:.4g} / D^{beta:.3f}" if b else "")


def fit(points: Sequence[Point]) -> Law:
    """Return the law of least squares with no negative term; raises `CheckpointError` if there are too few points."""
    sizes, tokens, losses = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    ratio = tokens / sizes
    together = ratio.max() / ratio.min() < 1.1
    needed = 3 if together else 5
    if len(set(sizes)) < (3 if together else 2) or len(points) < needed:
        raise CheckpointError(f"{len(points)} finished runs are too few for a fit; {needed} sizes are needed")
    best: tuple[float, Law] | None = None
    for alpha, beta in product(EXPONENTS, [1.0] if together else EXPONENTS):
        # scaled to about 1, so that least squares is well conditioned
        terms = [np.ones_like(sizes), (sizes / sizes[0]) ** -alpha]
        terms += [] if together else [(tokens / tokens[0]) ** -beta]
        found, *_ = np.linalg.lstsq(np.stack(terms, axis=1), losses, rcond=None)
        error = float(np.square(np.stack(terms, axis=1) @ found - losses).sum())
        if (found >= 0).all() and (best is None or error < best[0]):
            of_tokens = (0.0, 1.0) if together else (float(found[2] * tokens[0] ** beta), float(beta))
            best = error, Law(float(found[0]), (float(found[1] * sizes[0] ** alpha), float(alpha)), of_tokens)
    if best is None:
        raise CheckpointError("the losses do not fall with size, so no law fits them")
    return best[1]


def read_points(folder: Path) -> list[Point]:
    """Return the finished runs of a folder, by size."""
    found = []
    for run in read_runs(folder):
        if run.state == "finished" and run.loss is not None:
            keys = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "vocab_size")
            shape = {key: run.value(f"model.{key}") for key in keys}
            found.append(Point(n_params(**shape), (run.valid or run.train)[-1][0], run.loss))
    return sorted(found)


def report(folder: Path) -> str:
    """Return the law, each run's error, the prediction for the next size, and what the others say of the largest."""
    points = read_points(folder)
    law = fit(points)
    rows = [f"{'parameters':>14} {'tokens':>16} {'loss':>8} {'law':>8} {'error':>7}"]
    for point in points:
        expected = law.loss(point.n_params, point.tokens)
        error = expected / point.loss - 1
        rows.append(f"{point.n_params:14,} {point.tokens:16,} {point.loss:8.4f} {expected:8.4f} {error:7.2%}")
    largest = points[-1]
    smaller = [point for point in points if point.n_params < largest.n_params]
    larger = largest.n_params / smaller[-1].n_params
    size, tokens = round(largest.n_params * larger), round(largest.tokens * larger)
    rows.append(f"{size:14,} {tokens:16,} {'':8} {law.loss(size, tokens):8.4f}   predicted")
    text = "\n".join([str(law), *rows])
    try:
        predicted = fit(smaller).loss(largest.n_params, largest.tokens)
        error = predicted / largest.loss - 1
        text += f"\nthe smaller runs alone predict {predicted:.4f} for the largest, {error:+.2%} off"
    except CheckpointError:
        text += "\none size more, and the largest can be predicted from the others"
    with figure(folder / "scaling_law.png") as (axes,):
        sizes = np.geomspace(points[0].n_params, size, 50)
        ratio = largest.tokens / largest.n_params
        axes.plot(sizes, [law.loss(n, n * ratio) for n in sizes], color="0.6", label=f"{law}")
        axes.plot([point.n_params for point in points], [point.loss for point in points], "o", label="runs")
        axes.plot(size, law.loss(size, tokens), "x", label="the next size, predicted")
        axes.set(xscale="log", xlabel="parameters of blocks and head")
        axes.legend(fontsize="small")
    (folder / "scaling_law.md").write_text(
        f"```\n{text}\n```\n\n![loss over size](scaling_law.png)\n", encoding="utf-8"
    )
    return text


if __name__ == "__main__":
    folder_command(lambda folder: print(report(folder)), "tracking.scaling_law", __doc__)
