"""Loggers: metrics.jsonl, TensorBoard, Weights & Biases, and custom ones."""

import json
import logging
import math
import netrc
import os
import pkgutil
import secrets
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from tracking.config import LoggerConfig
from tracking.logs import without_secrets
from tracking.metrics_file import METRICS, read_records
from tracking.plot import plot_loss
from tracking.run_folder import Lines, write_atomically

# "step", "tokens", and metrics such as "train/loss"; non-finite values are None, and texts are a list of rows
Record = dict[str, Any]

logger = logging.getLogger(__name__)


class Logger:
    """Base class of loggers; name subclasses in `logger.extra`.

    `step` is the step that the run starts at. A logger that raises is dropped with a warning.
    """

    def __init__(self, run_dir: Path, run_config: dict[str, Any], step: int) -> None:
        pass

    def log(self, record: Record) -> None:
        """Log the record of a step or a validation."""

    def close(self) -> None:
        """Flush and close, at the end of the run."""


class JsonLines(Logger):
    def __init__(self, run_dir: Path, run_config: dict[str, Any], step: int) -> None:
        self.file = Lines(run_dir / METRICS)

    def log(self, record: Record) -> None:
        self.file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self.file.close()


class TensorBoard(Logger):
    def __init__(self, run_dir: Path, run_config: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        # Hide events that a killed run wrote after its last checkpoint.
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def log(self, record: Record) -> None:
        for key, value in _metrics(record).items():
            if isinstance(value, list):
                self.writer.add_text(key, as_markdown(value), record["step"])
            else:
                self.writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self.writer.close()


class Wandb(Logger):
    """Weights & Biases: one W&B run per run folder, grouped by name; offline without an API key."""

    def __init__(self, run_dir: Path, run_config: dict[str, Any], step: int) -> None:
        import wandb

        id_file, stored = run_dir / "wandb_id", None
        if not step or not id_file.exists():  # a run that starts over is a new W&B run: steps cannot be logged twice
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        with suppress(FileNotFoundError, netrc.NetrcParseError):
            stored = netrc.netrc().authenticators("api.wandb.ai")
        if not (os.environ.get("WANDB_API_KEY") or stored):
            os.environ.setdefault("WANDB_MODE", "offline")
        settings, arguments = run_config["logger"], " ".join(sys.argv)
        self.run = wandb.init(
            **{key: settings[f"wandb_{key}"] for key in ("project", "entity", "tags", "notes")},
            name=run_dir.name,
            group=run_config["name"],
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(run_dir),
            config=run_config,
            settings={"x_disable_meta": arguments != without_secrets(arguments)},  # they are part of it
        )

    def log(self, record: Record) -> None:
        import wandb

        values = _metrics(record)
        for key, rows in values.items():
            if isinstance(rows, list):
                values[key] = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self.run.log(values, step=record["step"])

    def close(self) -> None:
        self.run.finish()


class Loggers:
    """All loggers of a run, on rank 0. One that fails is dropped with a warning."""

    def __init__(
        self, run_dir: Path, config: LoggerConfig, *, run_config: dict[str, Any], step: int, rank: int = 0
    ) -> None:
        self.run_dir, self.rank = run_dir, rank
        self.loggers: list[Logger] = []
        shown = json.loads(without_secrets(json.dumps(run_config)))
        own: list[type[Logger]] = [JsonLines, *[TensorBoard] * config.tensorboard, *[Wandb] * config.wandb]
        for make in () if rank else (*own, *map(pkgutil.resolve_name, config.extra)):
            self._try(make, lambda make=make: self.loggers.append(make(run_dir, shown, step)))

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.loggers:
            self._try(type(each), each.close)

    def log(self, record: Record) -> None:
        """Log a record; non-finite values become None."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.loggers = [each for each in self.loggers if self._try(type(each), lambda each=each: each.log(finite))]

    def plot(self) -> None:
        """Write loss.png and samples.md from metrics.jsonl."""
        if not self.rank:
            self._try(plot_loss, lambda: plot_loss(self.run_dir / METRICS, self.run_dir / "loss.png"))
            self._try(write_samples, lambda: write_samples(self.run_dir))

    def _try(self, what: Any, call: Callable[[], object]) -> bool:
        try:
            call()
        except Exception as error:  # libraries raise anything on disk or network errors
            logger.warning("%s is dropped: %s", what.__name__, error)
            return False
        return True


def _metrics(record: Record) -> Record:
    return {key: value for key, value in record.items() if key != "step" and value is not None}


def write_samples(run_dir: Path) -> None:
    """Write samples.md from metrics.jsonl, if it has samples: a table per prompt."""
    rows: dict[str, list[Record]] = {}
    for record in read_records(run_dir / METRICS):
        for sample in record.get("samples", ()):
            rows.setdefault(sample["prompt"], []).append({"step": record["step"], "text": sample["text"]})
    if rows:
        parts = [f"## {_cell(prompt)}\n\n{as_markdown(samples)}\n" for prompt, samples in rows.items()]
        write_atomically(run_dir / "samples.md", "\n".join(parts))


def as_markdown(rows: Sequence[Record]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(str(value)) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return f"<code>{escape(text).replace('|', '&#124;').replace(chr(10), '<br>')}</code>"
