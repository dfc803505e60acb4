"""loss.png: training loss, faint and smoothed, and validation loss, over the tokens of the run."""

import json
from pathlib import Path

SMOOTHING = 0.9


def plot_loss(metrics: Path, picture: Path) -> None:
    """Draw the losses in a metrics.jsonl; nothing is drawn of a run without steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    train = [(r["tokens"], r["train/loss"]) for r in records if r.get("train/loss") is not None]
    valid = [(r["tokens"], r["valid/loss"]) for r in records if r.get("valid/loss") is not None]
    if not train:
        return
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    tokens = [t for t, _ in train]
    axes.plot(tokens, [loss for _, loss in train], color="tab:blue", alpha=0.3, linewidth=0.8)
    axes.plot(tokens, smoothed([loss for _, loss in train]), color="tab:blue", label="train, smoothed")
    if valid:
        axes.plot(*zip(*valid, strict=True), color="tab:orange", marker="o", markersize=4, label="validation")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(picture.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    partial = picture.with_name(f".{picture.name}")
    figure.savefig(partial, format="png")
    partial.replace(picture)


def smoothed(values: list[float]) -> list[float]:
    """Exponential moving average, corrected for its start as Adam's moments are."""
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append(mean / weight)
    return result
