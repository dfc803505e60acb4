"""Compare the runs of a sweep, while it runs or after: python -m tracking.compare runs/lr_sweep.

Writes a table of what differs between the runs and what came out, and two pictures, to <folder>/compare.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracking.logs import folder_command
from tracking.metrics_file import METRICS, Curve, loss_curve, read_records, smoothed
from tracking.plot import figure
from tracking.run_folder import changed_keys, is_held
from tracking.status import read_status
from training.config import CheckpointError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOT_COMPARED = ("launcher", "logger", "checkpoint")
MOST_KEYS = 12  # settings in the table and the pictures
MOST_LABELS = 20  # of a picture's curves
MOST_SCORES = 12  # of tasks in the table
SCORE = re.compile(r"evaluation/.+/(acc|acc_norm|bpb)")
WIDE_RANGE = 8.0  # values that span this factor are drawn on a logarithmic scale


@dataclass
class Run:
    name: str
    state: str
    config: dict[str, Any]
    train: Curve  # smoothed
    valid: Curve
    step: int = 0
    bits_per_byte: float | None = None
    scores: dict[str, float | None] = field(default_factory=dict)  # of tasks, by "name metric"
    of_sources: dict[str, float | None] = field(default_factory=dict)  # validation losses
    tokens_per_s: float | None = None  # per device
    reason: str = ""
    folder: Path = Path()

    @property
    def tokens(self) -> int:
        return max((tokens for tokens, _ in [*self.train[-1:], *self.valid[-1:]]), default=0)

    @property
    def loss(self) -> float | None:
        """The last validation loss, or the training loss of a run without one; inf if the run diverged."""
        curve = self.valid or self.train
        return math.inf if self.state == "diverged" else curve[-1][1] if curve else None

    def value(self, key: str) -> Any:
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def compare(folder: Path, *, show: bool = False) -> str:
    """Write table.txt, table.md, loss.png and final.png about the runs in a folder; return the table."""
    runs = sorted(
        read_runs(folder), key=lambda run: (run.state != "finished", run.loss is None, run.loss or 0, run.name)
    )
    keys = swept_keys(runs)
    notes = [f"{run.name}: {run.reason.splitlines()[0]}" for run in runs if run.state == "failed" and run.reason]
    if len(keys) > MOST_KEYS:
        notes.append(f"{len(keys) - MOST_KEYS} more settings differ; see config.yaml in the runs' folders")
        keys = sorted(keys, key=lambda key: (key != "name", not key.endswith(".name")))[:MOST_KEYS]
    rows = table(runs, keys)
    text = "\n".join([*aligned(rows), *notes])
    if show:
        print(text, flush=True)
    out = folder / "compare"
    out.mkdir(exist_ok=True)
    pictures = {"loss.png": "loss", "final.png": "final loss"} if any(run.train for run in runs) else {}
    if pictures:
        draw([run for run in runs if run.train], keys, out)
    mixed = [run for run in runs if run.state == "finished" and run.of_sources and run.value("data.mix")]
    if any(key.startswith("data.mix") for key in keys) and mixed:
        draw_mixtures(mixed, out)
        pictures["mix.png"] = "validation losses over shares in the mixture"
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    images = [f"![{title}]({name})" for name, title in pictures.items()]
    parts = [as_markdown(rows), *(f"- {note}" for note in notes), *images]
    (out / "table.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    if show:
        print(f"in {out}: {', '.join(['table.md', 'table.txt', *pictures])}", flush=True)
    return text


def read_runs(folder: Path) -> list[Run]:
    """Read every run in or below a folder; raises `CheckpointError` if there is none."""
    found = sorted(path.parent for path in folder.glob("**/status.json") if read_status(path.parent))
    if not found:
        raise CheckpointError(f"there is no run in {folder}; name a sweep's folder, such as runs/lr_sweep")
    return [_read(path, folder) for path in found]


def _read(path: Path, folder: Path) -> Run:
    status, records = read_status(path), read_records(path / METRICS)
    killed = status["state"] == "running" and not is_held(path)
    train, valid = (loss_curve(records, f"{kind}/loss") for kind in ("train", "valid"))
    diverged = any(curve and curve[-1][1] == math.inf for curve in (train, valid))
    last = {key: value for record in records for key, value in record.items()}
    return Run(
        name=str(path.relative_to(folder)) if path != folder else folder.name,
        state="failed" if killed else "diverged" if diverged and status["state"] == "finished" else status["state"],
        config=status["config"],
        train=smoothed(train),
        valid=valid,
        step=last.get("step", 0),
        bits_per_byte=last.get("valid/bits_per_byte"),
        scores={
            " ".join(key.removeprefix("evaluation/").rsplit("/", 1)): last[key] for key in last if SCORE.fullmatch(key)
        },
        of_sources={key.removeprefix("valid/loss/"): last[key] for key in last if key.startswith("valid/loss/")},
        tokens_per_s=last.get("perf/tgs_all"),
        folder=path,
        reason="it was killed, or ran out of memory" if killed else status.get("reason", ""),
    )


def swept_keys(runs: Sequence[Run]) -> list[str]:
    """Return the dotted keys in which runs differ, but for where and how they ran, and what a group's name implies."""
    changed = [key for run in runs[1:] for key, _, _ in changed_keys(runs[0].config, run.config)]
    keys = [key for key in dict.fromkeys(changed) if key.split(".")[0] not in NOT_COMPARED]

    def follows(key: str, name: str) -> bool:
        pairs = {(run.value(name), str(run.value(key))) for run in runs}
        return key != name and name in keys and len(pairs) == len({group for group, _ in pairs})

    return [key for key in keys if not follows(key, f"{key.split('.')[0]}.name")]


def short_names(keys: Sequence[str]) -> list[str]:
    """Return the last word of each key, the group's for its name, or the whole key where two share a word."""
    words = [key.removesuffix(".name").rsplit(".", 1)[-1] for key in keys]
    return [word if words.count(word) == 1 else key for key, word in zip(keys, words, strict=True)]


def table(runs: Sequence[Run], keys: Sequence[str]) -> list[list[str]]:
    """Return the header and one row per run."""
    scores = sorted({name for run in runs for name in run.scores})[:MOST_SCORES]
    rows = [[*(short_names(keys) or ["run"]), "loss", "bits/byte", *scores, "tok/s/gpu", "tokens", "step", "state"]]
    for run in runs:
        cells = [_shown(run.value(key), "g") for key in keys] or [run.name]
        cells += [_shown(value, ".4f") for value in (run.loss, run.bits_per_byte, *map(run.scores.get, scores))]
        cells += [_shown(run.tokens_per_s, ",.0f")]
        rows.append([*cells, f"{run.tokens:,}", f"{run.step}/{run.config['steps']}", run.state])
    return rows


def _shown(value: Any, spec: str) -> str:
    if isinstance(value, float):
        return format(value, spec) if math.isfinite(value) else "-"
    return "-" if value is None else _short(str(value))


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:19]}…{text[-20:]}"


def aligned(rows: list[list[str]]) -> list[str]:
    """Return rows as lines with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([*map(str.rjust, row[:-1], widths), row[-1]]) for row in rows]


def as_markdown(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---:"] * (len(rows[0]) - 1) + [":---"], *rows[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def draw(runs: Sequence[Run], keys: Sequence[str], out: Path) -> None:
    """Draw loss.png, losses over tokens, and final.png, the last loss over each swept value; every run has a loss."""
    from matplotlib import colormaps

    labelled, by_name = runs[:MOST_LABELS], not keys or "name" in keys
    keys = [key for key in keys if key != "name"]
    names = dict(zip(keys, short_names(keys), strict=True))
    runs = sorted(runs, key=lambda run: [_sortable(run.value(key)) for key in keys])
    colors = {run.name: colormaps["viridis"](0.9 * i / max(1, len(runs) - 1)) for i, run in enumerate(runs)}
    with figure(out / "loss.png", 11) as (axes,):
        for run in runs:
            varied = ", ".join(f"{names[key]} {_shown(run.value(key), 'g')}" for key in keys)
            label = _short(run.name if by_name else varied) + ("" if run.state == "finished" else f" ({run.state})")
            label = label if run in labelled else None
            axes.plot(*zip(*run.train, strict=True), color=colors[run.name], label=label)
            if run.valid:
                axes.plot(*zip(*run.valid, strict=True), "o", color=colors[run.name], markersize=4)
        best = f"; the best {MOST_LABELS} are named" if len(runs) > MOST_LABELS else ""
        axes.set(xlabel="tokens", title=f"training loss, smoothed, and validation (dots){best}")
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    panels = list(keys) or ["seed"]
    with figure(out / "final.png", 5, len(panels)) as row:
        for axes, key in zip(row, panels, strict=True):
            axes.set(xlabel=names.get(key, key), title="last loss (o finished, x not)")
            _draw_final(axes, runs, key, colors, [other for other in keys if other != key])


def draw_mixtures(runs: Sequence[Run], out: Path) -> None:
    """Draw mix.png, each source's validation loss over its share of the training data."""
    with figure(out / "mix.png") as (axes,):
        for source in sorted({source for run in runs for source in run.of_sources}):
            points = [(run.value("data.mix"), run.of_sources.get(source)) for run in runs]
            shares = [(mix.get(source, 0.0) / sum(mix.values()), loss) for mix, loss in points if loss is not None]
            axes.plot(*zip(*sorted(shares), strict=True), "o-", label=source)
        axes.set(xlabel="share of the source in training", title="validation loss by source")
        axes.legend(fontsize="small")


def _draw_final(axes: "Axes", runs: Sequence[Run], key: str, colors: dict[str, Any], others: Sequence[str]) -> None:
    """Draw last losses over the values of a key, with a line through finished runs that agree in all `others`."""
    values = [run.value(key) for run in runs]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numeric:
        values = [_short(str(value)) for value in values]  # which matplotlib draws as categories
        axes.tick_params("x", rotation=30 if max(map(len, values)) * len(set(values)) < 60 else 90, labelsize="small")
    elif min(values) > 0 and max(values) / min(values) >= WIDE_RANGE:
        axes.set_xscale("log")
    lines: dict[str, list[tuple[Any, float | None]]] = {}
    for value, run in zip(values, runs, strict=True):
        if run.state == "finished":
            lines.setdefault(str([run.value(other) for other in others]), []).append((value, run.loss))
        loss, marker = math.nan if run.loss is None else run.loss, "o" if run.state == "finished" else "x"
        axes.plot(value, loss, marker, color=colors[run.name], zorder=2)
    for line in lines.values() if numeric else ():
        axes.plot(*zip(*sorted(line), strict=True), color="0.7", zorder=1)


def _sortable(value: Any) -> tuple[int, float, str]:
    return (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, str(value))


if __name__ == "__main__":
    folder_command(lambda folder: compare(folder, show=True), "tracking.compare", __doc__)
