"""Read a sweep, while it runs or after: python -m tracking.compare runs/lr_sweep.

A table of what differed between the runs and what came out, and two pictures, in <folder>/compare.
"""

import argparse
import json
import math
import sys
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracking.plot import smoothed
from tracking.run_folder import changed_keys, is_held
from tracking.status import read_status
from training.config import CheckpointError

NOT_COMPARED = ("name", "launcher", "logger", "checkpoint")
WIDE_RANGE = 8.0  # values that span this factor are drawn on a logarithmic scale
FOLDER = "compare"


@dataclass
class Run:
    """What a run folder tells of itself."""

    name: str
    state: str
    config: dict[str, Any]
    train: list[tuple[int, float]]  # (tokens, loss)
    valid: list[tuple[int, float]]
    step: int
    bits_per_byte: float | None
    tokens_per_s: float | None  # of one device
    reason: str

    @property
    def loss(self) -> float | None:
        """The last validation loss, or the smoothed training loss of a run without one."""
        if self.valid:
            return self.valid[-1][1]
        return smoothed([loss for _, loss in self.train])[-1] if self.train else None


def compare(folder: Path, *, tell: bool = False) -> str:
    """Compare the runs in a folder, write table.txt, table.md, loss.png and final.png, and give the table."""
    runs = read_runs(folder)
    keys = swept_keys(runs)
    ordered = sorted(runs, key=lambda run: (run.state != "finished", run.loss is None, run.loss or 0.0, run.name))
    header, rows = table(ordered, keys)
    text = as_text(header, rows)
    notes = [f"{run.name}: {run.reason.splitlines()[0]}" for run in ordered if run.state == "failed" and run.reason]
    if tell:
        print("\n".join([text, *notes]), flush=True)
    out = folder / FOLDER
    out.mkdir(exist_ok=True)
    pictures = draw(ordered, keys, out)
    (out / "table.txt").write_text("\n".join([text, *notes]) + "\n")
    marked = [as_markdown(header, rows), *(f"- {note}" for note in notes), *(f"![{of}]({n})" for n, of in pictures)]
    (out / "table.md").write_text("\n\n".join(marked) + "\n")
    if tell:
        print(f"in {out}: {', '.join(['table.md', 'table.txt', *(name for name, _ in pictures)])}", flush=True)
    return text


def read_runs(folder: Path) -> list[Run]:
    """Read every run folder below a folder, or the folder itself; raises `CheckpointError` if there is none."""
    found = sorted(path.parent for path in folder.glob("**/status.json") if read_status(path.parent))
    if not found:
        raise CheckpointError(f"there is no run in {folder}; name a sweep's folder, such as runs/lr_sweep")
    return [_read(path, str(path.relative_to(folder)) if path != folder else folder.name) for path in found]


def _read(path: Path, name: str) -> Run:
    status, records = read_status(path), []
    metrics = path / "metrics.jsonl"
    for line in metrics.read_text().splitlines() if metrics.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break  # being written
    state = status["state"]
    if state == "running" and not is_held(path):
        state = "failed"
        status["reason"] = "it ended without a word: killed, or out of memory"

    def last(key: str) -> float | None:
        return next((record[key] for record in reversed(records) if record.get(key) is not None), None)

    return Run(
        name=name,
        state=state,
        config=status["config"],
        train=[(r["tokens"], r["train/loss"]) for r in records if r.get("train/loss") is not None],
        valid=[(r["tokens"], r["valid/loss"]) for r in records if r.get("valid/loss") is not None],
        step=records[-1]["step"] if records else 0,
        bits_per_byte=last("valid/bits_per_byte"),
        tokens_per_s=last("perf/tgs_all"),
        reason=status.get("reason", ""),
    )


def swept_keys(runs: Sequence[Run]) -> list[str]:
    """Give the dotted keys in which runs differ, but for those that say where and how they ran.

    What goes with a group's name, such as the width of model=125m, is not told beside it.
    """
    keys: dict[str, None] = {}
    for run in runs[1:]:
        for key, _, _ in changed_keys(runs[0].config, run.config):
            if key.split(".")[0] not in NOT_COMPARED:
                keys[key] = None
    return [key for key in keys if not _goes_with_name(runs, key, f"{key.split('.')[0]}.name", keys)]


def _goes_with_name(runs: Sequence[Run], key: str, name: str, keys: Container[str]) -> bool:
    pairs = {(value_of(run, name), str(value_of(run, key))) for run in runs}
    return key != name and name in keys and len(pairs) == len({named for named, _ in pairs})


def value_of(run: Run, key: str) -> Any:
    value: Any = run.config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Give each key its last word, or the whole key where two share one; a group's name has that of the group."""
    words = [key.removesuffix(".name").rsplit(".", 1)[-1] for key in keys]
    return {key: word if words.count(word) == 1 else key for key, word in zip(keys, words, strict=True)}


def table(runs: Sequence[Run], keys: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Give the header and the rows of a comparison, one a run."""
    names = short_names(keys)
    header = [*(names[key] for key in keys), "loss", "bits/byte", "tok/s/gpu", "tokens", "step", "state"]
    if not keys:
        header.insert(0, "run")
    rows = []
    for run in runs:
        points = [*run.train[-1:], *run.valid[-1:]]
        cells = [_number(value_of(run, key)) for key in keys] or [run.name]
        cells += [_figure(run.loss, ".4f"), _figure(run.bits_per_byte, ".4f"), _figure(run.tokens_per_s, ",.0f")]
        tokens = f"{max((tokens for tokens, _ in points), default=0):,}"
        rows.append([*cells, tokens, f"{run.step}/{run.config['steps']}", run.state])
    return header, rows


def _figure(value: float | None, spec: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, spec)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def as_text(header: list[str], rows: list[list[str]]) -> str:
    """Set a table in columns, the last to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]))
    return "\n".join(lines)


def as_markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---:"] * (len(header) - 1) + [":---"], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def draw(runs: Sequence[Run], keys: Sequence[str], out: Path) -> list[tuple[str, str]]:
    """Draw loss.png, all losses over tokens, and final.png, the last loss over each swept value.

    Gives the name of each and what it is of; none while no run has a loss.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    pictures = [("loss.png", "loss"), ("final.png", "final loss")]
    drawn = [run for run in runs if run.train]
    if not drawn:
        for name, _ in pictures:
            (out / name).unlink(missing_ok=True)
        return []
    names = short_names(keys)
    by_value = sorted(drawn, key=lambda run: [_sortable(value_of(run, key)) for key in keys])
    shades = colormaps["viridis"]
    colors = {run.name: shades(0.9 * i / max(1, len(by_value) - 1)) for i, run in enumerate(by_value)}

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for run in by_value:
        label = ", ".join(f"{names[key]} {_number(value_of(run, key))}" for key in keys) or run.name
        label += "" if run.state == "finished" else f" ({run.state})"
        losses = smoothed([loss for _, loss in run.train])
        axes.plot([tokens for tokens, _ in run.train], losses, color=colors[run.name], label=label)
        if run.valid:
            axes.plot(*zip(*run.valid, strict=True), color=colors[run.name], marker="o", markersize=4, linestyle="none")
    axes.set(xlabel="tokens", ylabel="loss (nats a token)", title="training loss, smoothed, and validation (dots)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=1 + len(drawn) // 9)
    _save(figure, out / "loss.png")

    panels = list(keys) or ["seed"]
    figure = Figure(figsize=(5 * len(panels), 4), dpi=120, layout="constrained")
    for axes, key in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_final(axes, by_value, key, names.get(key, key), colors, [other for other in keys if other != key])
    _save(figure, out / "final.png")
    return pictures


def _draw_final(
    axes: Any, runs: Sequence[Run], key: str, name: str, colors: dict[str, Any], others: Sequence[str]
) -> None:
    """Draw last losses over the values of a key, with a line through finished runs that agree in all `others`."""
    values = [value_of(run, key) for run in runs]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    positions = values if numeric else [sorted({str(v) for v in values}).index(str(value)) for value in values]
    if numeric and min(values) > 0 and max(values) / min(values) >= WIDE_RANGE:
        axes.set_xscale("log")
    elif not numeric:
        words = sorted({str(value) for value in values})
        axes.set_xticks(range(len(words)), words)
    lines: dict[str, list[tuple[Any, float | None]]] = {}
    for position, run in zip(positions, runs, strict=True):
        if run.state == "finished":
            lines.setdefault(str([value_of(run, other) for other in others]), []).append((position, run.loss))
        mark = "o" if run.state == "finished" else "x"
        axes.scatter([position], [run.loss], color=[colors[run.name]], marker=mark, zorder=2)
    for line in lines.values():
        if numeric:
            axes.plot(*zip(*sorted(line), strict=True), color="0.7", zorder=1)
    axes.set(xlabel=name, ylabel="last loss (nats a token)", title="o finished   x not")
    axes.grid(alpha=0.3)


def _sortable(value: Any) -> tuple[int, float, str]:
    return (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, str(value))


def _save(figure: Any, path: Path) -> None:
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, format="png")
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tracking.compare")
    parser.add_argument("folder", type=Path, help="a sweep's folder, such as runs/lr_sweep")
    try:
        compare(parser.parse_args().folder, tell=True)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
