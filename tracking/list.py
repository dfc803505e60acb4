"""List all runs with their command-line arguments, newest first: python -m tracking.list"""

from itertools import pairwise
from pathlib import Path

from omegaconf import OmegaConf

from tracking.compare import Run, aligned, read_runs
from tracking.logs import folder_command
from tracking.metrics_file import METRICS, read_records
from tracking.status import read_status


def list_runs(folder: Path) -> str:
    """Return a table of the runs in or below a folder."""
    runs = sorted(read_runs(folder), key=lambda run: -read_status(run.folder)["time"])
    rows = [["run", "state", "loss", "tokens", "step", "hours", "started with"], *map(_row, runs)]
    return "\n".join(aligned(rows))


def _row(run: Run) -> list[str]:
    overrides = run.folder / ".hydra" / "overrides.yaml"
    typed = " ".join(OmegaConf.to_container(OmegaConf.load(overrides))) if overrides.exists() else ""  # type: ignore[arg-type]
    records = [{"step": 0}, *(r for r in read_records(run.folder / METRICS) if "perf/step_s" in r)]
    seconds = sum(record["perf/step_s"] * (record["step"] - before["step"]) for before, record in pairwise(records))
    loss = "-" if run.loss is None else f"{run.loss:.4f}"
    return [run.name, run.state, loss, *run.progress(), f"{seconds / 3600:.2f}", typed]


if __name__ == "__main__":
    folder_command(lambda folder: print(list_runs(folder)), "tracking.list", __doc__, default="runs")
