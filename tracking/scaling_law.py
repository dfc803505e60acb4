"""Fit and extrapolate the losses of a ladder of models: python -m tracking.scaling_law runs/ladder.

L(N, D) = E + A / N^a + B / D^b (Hoffmann et al. 2022, arXiv:2203.15556), with N the parameters of blocks and head, and
D the training tokens. If D / N is constant, as in a ladder, the terms merge: L(N) = E + A / N^a. Writes
scaling_law.md and scaling_law.png to the folder.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from conf.ladder import n_params
from tracking.compare import aligned, read_runs
from tracking.logs import folder_command
from tracking.plot import figure, log_scale
from training.config import CheckpointError

EXPONENTS = np.geomspace(0.03, 1.5, 120)
SHAPE = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "vocab_size")


class Point(NamedTuple):
    n_params: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class Law:
    """floor + a / N^alpha + b / D^beta; `b` is 0 if tokens are proportional to parameters."""

    floor: float
    a: float
    alpha: float
    b: float = 0.0
    beta: float = 1.0

    def loss(self, n_params: float, tokens: float) -> float:
        return self.floor + self.a / n_params**self.alpha + self.b / tokens**self.beta

    def __str__(self) -> str:
        of_tokens = f" + {self.b:.4g} / D^{self.beta:.3f}" if self.b else ""
        return f"L = {self.floor:.4g} + {self.a:.4g} / N^{self.alpha:.3f}{of_tokens}"


def fit(points: Sequence[Point]) -> Law:
    """Fit a law by least squares with non-negative terms; raise `CheckpointError` if there are too few points."""
    sizes, tokens, losses = np.array(points, dtype=float).T
    ratio = tokens / sizes
    together = ratio.max() / ratio.min() < 1.1
    needed = 3 if together else 5
    if len(set(sizes)) < (3 if together else 2) or len(points) < needed:
        raise CheckpointError(f"{len(points)} finished runs are too few for a fit; {needed} sizes are needed")
    best, best_error = None, np.inf
    for alpha, beta in product(EXPONENTS, [1.0] if together else EXPONENTS):
        # scaled to about 1, so that least squares is well conditioned
        of_size, of_tokens = (sizes / sizes[0]) ** -alpha, (tokens / tokens[0]) ** -beta
        terms = np.stack([np.ones_like(sizes), of_size, of_tokens * (not together)], axis=1)
        floor, a, b = found = np.linalg.lstsq(terms, losses, rcond=None)[0]
        error = np.square(terms @ found - losses).sum()
        if found.min() >= 0 and error < best_error:
            best, best_error = Law(floor, a * sizes[0] ** alpha, alpha, b * tokens[0] ** beta, beta), error
    if best is None:
        raise CheckpointError("the losses do not fall with size, so no law fits them")
    return best


def read_points(folder: Path) -> list[Point]:
    """Return the finished runs of a folder, by size."""
    found = []
    for run in read_runs(folder):
        if run.state == "finished" and run.loss is not None:
            size = n_params(**{key: run.value(f"model.{key}") for key in SHAPE})
            found.append(Point(size, (run.valid or run.train)[-1][0], run.loss))
    return sorted(found)


def report(folder: Path) -> str:
    """Return the law, the error of each run, and predictions for the next size and for the largest from the smaller."""
    points = read_points(folder)
    law, largest = fit(points), points[-1]
    smaller = [point for point in points if point.n_params < largest.n_params]
    growth = largest.n_params / smaller[-1].n_params
    size, tokens = round(largest.n_params * growth), round(largest.tokens * growth)
    rows = [["parameters", "tokens", "loss", "law", "error"]]
    for n, trained, loss in points:
        expected = law.loss(n, trained)
        rows.append([f"{n:,}", f"{trained:,}", f"{loss:.4f}", f"{expected:.4f}", f"{expected / loss - 1:.2%}"])
    rows.append([f"{size:,}", f"{tokens:,}", "", f"{law.loss(size, tokens):.4f}", "predicted"])
    text = "\n".join([str(law), *aligned(rows)])
    with suppress(CheckpointError):  # too few points
        predicted = fit(smaller).loss(largest.n_params, largest.tokens)
        error = predicted / largest.loss - 1
        text += f"\nthe smaller runs alone predict {predicted:.4f} for the largest, {error:+.2%} off"
    with figure(folder / "scaling_law.png") as (axes,):
        sizes = np.geomspace(points[0].n_params, size, 50)
        ratio = largest.tokens / largest.n_params
        axes.plot(sizes, [law.loss(n, n * ratio) for n in sizes], color="0.6", label=str(law))
        axes.plot([point.n_params for point in points], [point.loss for point in points], "o", label="runs")
        axes.plot(size, law.loss(size, tokens), "x", label="the next size, predicted")
        axes.set_xlabel("parameters of blocks and head")
        log_scale(axes)
        axes.legend(fontsize="small")
    page = f"```\n{text}\n```\n\n![loss over size](scaling_law.png)\n"
    (folder / "scaling_law.md").write_text(page, encoding="utf-8")
    return text


if __name__ == "__main__":
    folder_command(lambda folder: print(report(folder)), "tracking.scaling_law", __doc__)
