"""metrics.jsonl: a JSON record per logged step and per validation."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tracking.run_folder import write_atomically

METRICS = "metrics.jsonl"  # in a run folder
SMOOTHING = 0.9
HEAD = 100  # bytes of a record with step, tokens and the first loss

Curve = list[tuple[int, float]]  # (tokens, loss)


def read_records(path: Path, every: int = 1) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines: all validations, and every n-th of the others.

    Incomplete or damaged lines are skipped.
    """
    records = []
    with suppress(FileNotFoundError), path.open("rb") as file:
        for number, line in enumerate(file):
            if number % every == 0 or b'"valid/loss"' in line[:HEAD]:
                with suppress(ValueError):
                    records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def loss_curve(records: Sequence[dict[str, Any]], key: str) -> Curve:
    """Return a metric over tokens, negated for -key; null in the file (not finite) becomes inf."""
    name, sign = key.removeprefix("-"), -1 if key.startswith("-") else 1
    return [(r["tokens"], math.inf if r[name] is None else sign * r[name]) for r in records if name in r]


def last_value(run_dir: Path, key: str) -> float | None:
    """Return the last value of a metric, as in `loss_curve`; None if it is not finite."""
    curve = loss_curve(read_records(run_dir / METRICS), key)
    return curve[-1][1] if curve and math.isfinite(curve[-1][1]) else None


def smoothed(curve: Curve, decay: float = SMOOTHING) -> Curve:
    """Return the bias-corrected exponential moving average; inf is kept."""
    result, mean, weight = [], 0.0, 0.0
    for tokens, loss in curve:
        if math.isfinite(loss):
            mean = decay * mean + (1 - decay) * loss
            weight = decay * weight + (1 - decay)
        result.append((tokens, mean / weight if math.isfinite(loss) else loss))
    return result


def centred(curve: Curve) -> Curve:
    """Return the curve smoothed without lag, by the mean of both directions, and less if it is short."""
    decay = min(SMOOTHING, 1 - 1 / max(1.0, len(curve) / 20))
    both = zip(smoothed(curve, decay), smoothed(curve[::-1], decay)[::-1], strict=True)
    return [(tokens, (before + after) / 2) for (tokens, before), (_, after) in both]


def last_step(run_dir: Path) -> int:
    return max((record["step"] for record in read_records(run_dir / METRICS)), default=0)


def add_record(path: Path, record: dict[str, Any]) -> None:
    """Insert a record by step, or update a record of the same step that has some of its metrics.

    A validation of the run itself stays, so that runs are compared by the same measure.
    """
    records, keys = read_records(path), record.keys() - {"step", "tokens"}
    same = next((r for r in records if r["step"] == record["step"] and keys & r.keys()), None)
    if same is None:
        records.append(record)
    else:
        same |= {key: value for key, value in record.items() if key not in same or not key.startswith("valid/")}
    _write(path, sorted(records, key=lambda r: r["step"]))


def truncate_metrics(path: Path, step: int, undone: tuple[str, ...]) -> None:
    """Drop records after `step`, where a run resumes, and metrics at `step` whose names start with `undone`."""
    kept = [record for record in read_records(path) if record["step"] <= step]
    for record in kept:
        if record["step"] == step:
            for key in [key for key in record if key.startswith(undone)]:
                del record[key]
    if path.exists():
        _write(path, [record for record in kept if record.keys() - {"step", "tokens"}])


def _write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
