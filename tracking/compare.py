"""Compare the runs of a sweep, finished or not: python -m tracking.compare runs/lr_sweep.

Writes a table of settings that differ and results, and plots, to <folder>/compare.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.config import plain_name
from tracking.logs import folder_command
from tracking.metrics_file import METRICS, Curve, loss_curve, read_records, smoothed
from tracking.plot import figure, log_scale
from tracking.run_folder import changed_keys, is_held
from tracking.status import read_status
from training.config import CheckpointError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOT_COMPARED = ("launcher", "logger", "checkpoint")
MOST_KEYS = 12  # settings in table and plots
MOST_LABELS = 20  # curves in a legend
SCORE = re.compile(r"evaluation/(.+)/(?!questions$)([^/]+)")
WIDE_RANGE = 8.0  # ratio of values from which an axis is logarithmic
OF_TRAINING = "*: training loss, smoothed, of a run without a validation"


@dataclass
class Run:
    name: str
    folder: Path
    state: str
    config: dict[str, Any]
    train: Curve  # smoothed
    valid: Curve
    last: dict[str, Any]  # the last value of each metric
    reason: str = ""  # why it failed

    @property
    def loss(self) -> float | None:
        """The last validation loss, else the training loss; inf if the run diverged."""
        curve = self.valid or self.train
        return math.inf if self.state == "diverged" else curve[-1][1] if curve else None

    def shown_loss(self) -> str:
        return _shown(self.loss, ".4f") + ("*" if self.train and not self.valid and self.state != "diverged" else "")

    def progress(self) -> list[str]:
        """Return tokens and steps, done and planned."""
        return [f"{self.last.get('tokens', 0):,}", f"{self.last.get('step', 0)}/{self.config['steps']}"]

    def value(self, key: str) -> Any:
        """Return the value of a dotted key of the configuration, or None."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def compare(folder: Path) -> str:
    """Print the table of the runs in a folder, best first; write it and plots to files; return the table."""

    def rank(run: Run) -> tuple:
        return run.state != "finished", not run.valid, run.loss or math.inf, run.name

    runs = sorted(read_runs(folder), key=rank)
    keys = swept_keys(runs)
    notes = [f"{run.name}: {run.reason.splitlines()[0]}" for run in runs if run.state == "failed" and run.reason]
    if len(keys) > MOST_KEYS:
        notes.append(f"{len(keys) - MOST_KEYS} more settings differ; see config.yaml in the runs' folders")
        keys = sorted(keys, key=lambda key: (key != "name", not key.endswith(".name")))[:MOST_KEYS]
    text = "\n".join([*aligned(table(runs, keys)), *footnote(runs), *notes])
    print(text, flush=True)
    out = folder / "compare"
    out.mkdir(exist_ok=True)
    pictures = draw([run for run in runs if run.train], keys, out)
    images = "".join(f"\n![{name}]({name})\n" for name in pictures)
    (out / "table.md").write_text(f"```\n{text}\n```\n{images}", encoding="utf-8")
    print(f"in {out}: {', '.join(['table.md', *pictures])}", flush=True)
    return text


def read_runs(folder: Path) -> list[Run]:
    """Read all runs in or below a folder; raise `CheckpointError` if there is none."""
    found = sorted(path.parent for path in folder.glob("**/status.json") if read_status(path.parent))
    if not found:
        raise CheckpointError(f"there is no run in {folder}; name the folder of a run or sweep, such as runs/demo")
    return [_read(path, folder) for path in found]


def _read(path: Path, folder: Path) -> Run:
    status, records = read_status(path), read_records(path / METRICS)
    train, valid = (loss_curve(records, f"{kind}/loss") for kind in ("train", "valid"))
    state, reason = status["state"], status.get("reason", "")
    if state == "running" and not is_held(path):
        state, reason = "failed", "it was killed, or ran out of memory"
    elif state == "finished" and any(curve and curve[-1][1] == math.inf for curve in (train, valid)):
        state = "diverged"
    name = str(path.relative_to(folder)) if path != folder else folder.name
    last = {key: value for record in records for key, value in record.items()}
    return Run(name, path, state, status["config"], smoothed(train), valid, last, reason)


def swept_keys(runs: Sequence[Run]) -> list[str]:
    """Return the dotted keys in which runs differ, without NOT_COMPARED and keys implied by their group's name."""
    changed = [key for run in runs[1:] for key, _, _ in changed_keys(runs[0].config, run.config)]
    keys = [key for key in dict.fromkeys(changed) if key.split(".")[0] not in NOT_COMPARED]
    names = {key: f"{key.split('.')[0]}.name" for key in keys}
    return [key for key, name in names.items() if key == name or name not in keys or not follows(key, [name], runs)]


def follows(key: str, others: Sequence[str], runs: Sequence[Run]) -> bool:
    """Return whether the value of a key is determined by those of other keys."""
    pairs = {(str([run.value(other) for other in others]), str(run.value(key))) for run in runs}
    return len(pairs) == len({values for values, _ in pairs})


def independent_keys(keys: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """Return the keys that are set by the runs' names, and those that do not follow from them."""
    named = [key for key in keys if all(f"{key.removesuffix('.name')}=" in run.name for run in runs)]
    return [key for key in keys if key in named or not (named and follows(key, named, runs))]


def short_names(keys: Sequence[str]) -> list[str]:
    """Return the last word of each key (the group for its name), or the full key if that is ambiguous."""
    words = [key.removesuffix(".name").rsplit(".", 1)[-1] for key in keys]
    return [word if words.count(word) == 1 else key for key, word in zip(keys, words, strict=True)]


def table(runs: Sequence[Run], keys: Sequence[str]) -> list[list[str]]:
    """Return the header and one row per run."""
    scores = sorted({key for run in runs for key in run.last if SCORE.fullmatch(key)})
    names = [SCORE.sub(r"\1 \2", key) for key in scores]
    rows = [[*(short_names(keys) or ["run"]), "loss", "bits/byte", *names, "tok/s/gpu", "tokens", "step", "state"]]
    for run in runs:
        figures = [run.last.get(key) for key in ("valid/bits_per_byte", *scores)]
        cells = [_shown(run.value(key), "g") for key in keys] or [run.name]
        cells += [run.shown_loss(), *(_shown(value, ".4f") for value in figures)]
        cells.append(_shown(run.last.get("perf/tgs_all"), ",.0f"))
        rows.append([*cells, *run.progress(), run.state])
    return rows


def _shown(value: Any, spec: str) -> str:
    if isinstance(value, float):
        return format(value, spec) if math.isfinite(value) else "-"
    return "-" if value is None else _short(str(value))


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:19]}…{text[-20:]}"


def aligned(rows: list[list[str]]) -> list[str]:
    """Return rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([*map(str.rjust, row[:-1], widths), row[-1]]) for row in rows]


def footnote(runs: Sequence[Run]) -> list[str]:
    return [OF_TRAINING] if any("*" in run.shown_loss() for run in runs) else []


def draw(runs: Sequence[Run], keys: Sequence[str], out: Path) -> list[str]:
    """Plot runs that have a loss; return the names of the files.

    loss.png: losses over tokens. final.png: last loss over each swept value. mix.png, for sweeps of the mixture: each
    source's validation loss over its share of the training data.
    """
    from matplotlib import colormaps

    if not runs:
        return []
    by_name, keys = not keys or "name" in keys, independent_keys([key for key in keys if key != "name"], runs)
    names = dict(zip(keys, short_names(keys), strict=True))
    with figure(out / "loss.png", 11) as (axes,):
        for i, run in enumerate(runs):
            label = _short(run.name) if by_name else _values(run, names)
            label += "" if run.state == "finished" else f" ({run.state})"
            color = colormaps["viridis"](0.9 * i / len(runs))
            axes.plot(*zip(*run.train, strict=True), color=color, label=label if i < MOST_LABELS else None)
            axes.plot(*zip(*run.valid or [((), ())], strict=True), "o", color=color, markersize=4)
        best = f"; the best {MOST_LABELS} are named" if len(runs) > MOST_LABELS else ""
        axes.set(xlabel="tokens", title=f"training loss, smoothed, and validation (dots){best}")
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    panels = keys or ["seed"]
    with figure(out / "final.png", 5, len(panels)) as row:
        for axes, key in zip(row, panels, strict=True):
            axes.set(xlabel=names.get(key, key), title="last loss (o finished, x not; ringed: the best)")
            _draw_final(axes, runs, key, {other: name for other, name in names.items() if other != key})
    mixed = [run for run in runs if run.state == "finished" and run.value("data.mix")]
    if not mixed or not any(key.startswith("data.mix") for key in keys):
        return ["loss.png", "final.png"]
    with figure(out / "mix.png") as (axes,):
        for key in sorted({key for run in mixed for key in run.last if key.startswith("valid/loss/")}):
            source = key.removeprefix("valid/loss/")
            points = [(run.value("data.mix"), run.last.get(key)) for run in mixed]
            found = [(mix, mix.get(source, mix.get(plain_name(source), 0.0)), loss) for mix, loss in points]
            shares = [(weight / sum(mix.values()), loss) for mix, weight, loss in found if loss is not None]
            axes.plot(*zip(*sorted(shares), strict=True), "o-", label=source)
        axes.set(xlabel="share of the source in training", title="validation loss by source")
        axes.legend(fontsize="small")
    return ["loss.png", "final.png", "mix.png"]


def _values(run: Run, names: dict[str, str]) -> str:
    """Return a run's values of the keys in `names`, by these names."""
    return _short(", ".join(f"{name} {_shown(run.value(key), 'g')}" for key, name in names.items()))


def _draw_final(axes: "Axes", runs: Sequence[Run], key: str, others: dict[str, str]) -> None:
    """Plot last losses over the values of a key.

    Lines join finished runs that agree in all `others` (names by key), and are labelled with the values of these; the
    best run of each is ringed. `runs` are sorted, the best first.
    """
    from matplotlib import colormaps

    values = [run.value(key) for run in runs]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numeric:
        values = [_short(str(value)) for value in values]  # matplotlib plots strings as categories
        axes.tick_params("x", rotation=90, labelsize="small")
    elif min(values) > 0 and max(values) / min(values) >= WIDE_RANGE:
        log_scale(axes)
    lines: dict[str, list[tuple[Any, Run]]] = {}
    for value, run in zip(values, runs, strict=True):
        lines.setdefault(str([run.value(other) for other in others]), []).append((value, run))
    named = 1 < len(lines) < len(runs) and len(lines) <= MOST_LABELS
    for number, line in enumerate(lines.values()):
        color = colormaps["viridis"](0.9 * number / len(lines)) if named else "tab:blue"
        for value, run in line:
            loss: Any = run.loss  # None is not plotted
            axes.plot(value, loss, "o" if run.state == "finished" else "x", color=color)
        done: list[Any] = [(value, run.loss) for value, run in line if run.state == "finished"]
        if len(done) > 1:
            axes.plot(*done[0], "o", color=color, markersize=12, fillstyle="none")
        joined = zip(*sorted(done), strict=True) if numeric and done else ([], [])
        axes.plot(*joined, color=color, label=_values(line[0][1], others))
    if named:
        axes.legend(fontsize="small")


if __name__ == "__main__":
    folder_command(compare, "tracking.compare", __doc__)
