"""Early stopping of points of a sweep that fall behind the best point."""

import logging
import math
from pathlib import Path

from tracking.config import EarlyStopConfig
from tracking.metrics_file import METRICS, Curve, loss_curve, read_records, smoothed

logger = logging.getLogger(__name__)


def is_hopeless(config: EarlyStopConfig, run_dir: Path, step: int) -> bool:
    """Return whether to end a run at `step`, compared with its siblings in the sweep's folder."""
    if config.margin is None or step < config.after_step or step % config.every:
        return False
    own = _curve(run_dir, config.metric)
    if not own:
        return False
    tokens, loss = own[-1]
    others = {path.parent for path in run_dir.parent.glob(f"*/{METRICS}")} - {run_dir}
    curves = {other.name: _curve(other, config.metric) for other in others}
    # Compare only with runs that have reached these tokens.
    reached = {name: next((loss for at, loss in curve if at >= tokens), math.inf) for name, curve in curves.items()}
    best = min(reached, key=lambda name: reached[name], default="")
    if not best or loss <= reached[best] + config.margin:
        return False
    message = "given up at step %d: %s is %.4f, that of %s at the same tokens %.4f (early_stop.margin is %g)"
    logger.info(message, step, config.metric, loss, best, reached[best], config.margin)
    return True


def _curve(run_dir: Path, metric: str) -> Curve:
    curve = loss_curve(read_records(run_dir / METRICS), metric)
    return smoothed(curve) if metric.startswith("train/") else curve
