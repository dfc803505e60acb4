"""List all runs with their command-line arguments, newest first: python -m tracking.list

Lines are cut to the width of a terminal.
"""

import sys
from itertools import pairwise
from pathlib import Path
from shutil import get_terminal_size

from omegaconf import OmegaConf

from tracking.compare import Run, aligned, footnote, read_runs
from tracking.logs import folder_command, without_secrets
from tracking.metrics_file import METRICS, read_records
from tracking.status import read_status


def list_runs(folder: Path) -> str:
    """Return a table of the runs in or below a folder."""
    runs = sorted(read_runs(folder), key=lambda run: -read_status(run.folder)["time"])
    rows = [["run", "state", "loss", "tokens", "step", "hours", "started with"], *map(_row, runs)]
    width = get_terminal_size().columns if sys.stdout.isatty() else None
    return "\n".join([*(line[:width] for line in aligned(rows)), *footnote(runs)])


def _row(run: Run) -> list[str]:
    overrides = run.folder / ".hydra" / "overrides.yaml"
    typed = map(str, OmegaConf.load(overrides)) if overrides.exists() else ()
    records = [{"step": 0}, *(r for r in read_records(run.folder / METRICS) if "perf/step_s" in r)]
    seconds = sum(record["perf/step_s"] * (record["step"] - before["step"]) for before, record in pairwise(records))
    shown = without_secrets(" ".join(override.lstrip("+") for override in typed))
    return [run.name, run.state, run.shown_loss(), *run.progress(), f"{seconds / 3600:.2f}", shown]


if __name__ == "__main__":
    folder_command(lambda folder: print(list_runs(folder)), "tracking.list", __doc__, default="runs")
