"""metrics.jsonl: a JSON record per logged step and per validation."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

from tracking.run_folder import write_atomically

METRICS = "metrics.jsonl"  # in a run folder
SMOOTHING = 0.9

Curve = list[tuple[int, float]]  # (tokens, loss)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines, without one that is being written, damaged or was cut short."""
    records = []
    with suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def loss_curve(records: Sequence[dict[str, Any]], key: str) -> Curve:
    """Return a metric over the run's tokens, of -key its negative; one that is not finite, null in the file, is inf."""
    name, sign = key.removeprefix("-"), -1 if key.startswith("-") else 1
    return [(r["tokens"], math.inf if r[name] is None else sign * r[name]) for r in records if name in r]


def last_value(run_dir: Path, key: str) -> float | None:
    """Return the last value of a metric of a run, as `loss_curve` has it; None if it is not finite."""
    curve = loss_curve(read_records(run_dir / METRICS), key)
    return curve[-1][1] if curve and math.isfinite(curve[-1][1]) else None


def smoothed(curve: Curve) -> Curve:
    """Return the exponential moving average, corrected for its start as Adam's moments are; inf stays where it is."""
    result, mean, weight = [], 0.0, 0.0
    for tokens, loss in curve:
        if math.isfinite(loss):
            mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
            weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append((tokens, mean / weight if math.isfinite(loss) else loss))
    return result


def centred(curve: Curve) -> Curve:
    """Return the mean around each point, so without lag, over about 2% of the curve; without what is not finite."""
    finite = [(tokens, loss) for tokens, loss in curve if math.isfinite(loss)]
    sums = [0.0, *accumulate(loss for _, loss in finite)]
    half = [min(len(finite) // 100 + 1, i, len(finite) - 1 - i) for i in range(len(finite))]
    return [
        (tokens, (sums[i + n + 1] - sums[i - n]) / (2 * n + 1))
        for i, ((tokens, _), n) in enumerate(zip(finite, half, strict=True))
    ]


def last_step(run_dir: Path) -> int:
    return max((record["step"] for record in read_records(run_dir / METRICS)), default=0)


def add_record(path: Path, record: dict[str, Any]) -> None:
    """Add a record where its step belongs, or to the one of its step that has some of its metrics already."""
    records, keys = read_records(path), record.keys() - {"step", "tokens"}
    same = next((r for r in records if r["step"] == record["step"] and keys & r.keys()), None)
    if same is None:
        records.append(record)
    else:
        same |= record
    records.sort(key=lambda r: r["step"])
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))


def truncate_metrics(path: Path, step: int, undone: tuple[str, ...]) -> None:
    """Drop the records after `step`, from which a run resumes, and of `step` the metrics that begin with `undone`."""
    kept = [record for record in read_records(path) if record["step"] <= step]
    for record in (record for record in kept if record["step"] == step):
        for key in [key for key in record if key.startswith(undone)]:
            del record[key]
    if path.exists():
        kept = [record for record in kept if record.keys() - {"step", "tokens"}]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
