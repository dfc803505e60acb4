"""Where records go: metrics.jsonl always, TensorBoard and Weights & Biases when asked."""

import json
import logging
import math
import netrc
import os
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tracking.config import LoggerConfig
from tracking.plot import plot_loss

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Loggers:
    """All the places a run's records go, opened and closed together.

    A failing display never stops a run that has a metrics.jsonl: it is told once and left. Only rank 0 writes.
    """

    def __init__(
        self, run_dir: Path, config: LoggerConfig, *, run_config: dict[str, Any], step: int, rank: int = 0
    ) -> None:
        self.run_dir, self.config, self.run_config, self.step, self.rank = run_dir, config, run_config, step, rank

    def __enter__(self) -> "Loggers":
        first = self.rank == 0
        self.tensorboard = _shown("TensorBoard", self._tensorboard) if self.config.tensorboard and first else None
        self.wandb = _shown("wandb", self._wandb) if self.config.wandb and first else None
        self.metrics = Path(os.devnull if self.rank else self.run_dir / "metrics.jsonl").open("a", buffering=1)
        return self

    def __exit__(self, *_: object) -> None:
        self.metrics.close()
        if self.tensorboard is not None:
            _shown("TensorBoard", self.tensorboard.close)
        if self.wandb is not None:
            _shown("wandb", self.wandb.finish)

    def log(self, record: dict[str, Any]) -> None:
        """Write a record with its `step`; a number that is not finite is written as null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.metrics.write(json.dumps(clean) + "\n")
        shown = {k: v for k, v in clean.items() if k != "step" and v is not None}
        if self.tensorboard is not None:
            self.tensorboard = _shown("TensorBoard", partial(_add_scalars, self.tensorboard, shown, record["step"]))
        if self.wandb is not None:
            self.wandb = _shown("wandb", partial(_log, self.wandb, shown, record["step"]))

    def plot(self) -> None:
        """Draw loss.png from everything in metrics.jsonl."""
        if self.rank:
            return
        _shown("loss.png", partial(plot_loss, self.run_dir / "metrics.jsonl", self.run_dir / "loss.png"))
        if self.tensorboard is not None:
            _shown("TensorBoard", self.tensorboard.flush)

    def _tensorboard(self) -> Any:
        from torch.utils.tensorboard.writer import SummaryWriter

        # Events past the checkpoint, of a run that was cut off, are hidden.
        return SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self.step + 1 if self.step else None)

    def _wandb(self) -> Any:
        import wandb

        id_file = self.run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        if not _has_wandb_key():
            os.environ.setdefault("WANDB_MODE", "offline")
        mode = os.environ.get("WANDB_MODE")
        logger.info("wandb: %s", "offline, no key was found" if mode == "offline" else mode or "online")
        return wandb.init(
            project=self.config.wandb_project,
            name=self.run_dir.name,
            group=self.run_config["name"],
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(self.run_dir),
            config=self.run_config,
        )


def _shown(display: str, call: Callable[[], T]) -> T | None:
    """Call something of a display; None, and a warning, if it fails."""
    try:
        return call()
    except Exception as error:  # whatever a library raises when its disk or its network is gone
        logger.warning("%s is left: %s", display, error)
        return None


def _add_scalars(writer: Any, shown: dict[str, Any], step: int) -> Any:
    for key, value in shown.items():
        writer.add_scalar(key, value, step)
    return writer


def _log(run: Any, shown: dict[str, Any], step: int) -> Any:
    run.log(shown, step=step)
    return run


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
