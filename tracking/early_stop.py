"""Ending a point of a sweep that falls behind: its loss is compared with that of the best point at the same tokens."""

import json
import logging
from pathlib import Path

from tracking.config import EarlyStopConfig
from tracking.plot import smoothed

logger = logging.getLogger(__name__)


def is_hopeless(config: EarlyStopConfig, run_dir: Path, step: int) -> bool:
    """Say whether the rule ends the run in this folder here; its siblings in the sweep's folder are the others."""
    if config.margin is None or step < config.after_step or step % config.every:
        return False
    own = curve(run_dir)
    if not own:
        return False
    tokens, loss = own[-1]
    others = {path.parent.name: loss_at(curve(path.parent), tokens) for path in run_dir.parent.glob("*/status.json")}
    others.pop(run_dir.name, None)
    known = {name: other for name, other in others.items() if other is not None}
    if not known:
        return False
    best = min(known, key=lambda name: known[name])
    if loss <= known[best] + config.margin:
        return False
    logger.info(
        "given up at step %d: the loss is %.4f, and that of %s at the same tokens %.4f (early_stop.margin is %g)",
        step, loss, best, known[best], config.margin,
    )  # fmt: skip
    return True


def curve(run_dir: Path) -> list[tuple[int, float]]:
    """Read a run's smoothed training loss over its tokens, as far as it has come; a loss that is not finite is inf."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    points = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break  # being written
        if "train/loss" in record:
            value = record["train/loss"]
            points.append((record["tokens"], float("inf") if value is None else value))
    return list(zip([tokens for tokens, _ in points], smoothed([loss for _, loss in points]), strict=True))


def loss_at(points: list[tuple[int, float]], tokens: int) -> float | None:
    """Give a curve's loss at so many tokens, or None if it has not come that far."""
    return next((loss for at, loss in points if at >= tokens), None)
