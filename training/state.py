"""How far a run has come: the integers that a checkpoint keeps and a resumed run starts from."""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

from training.config import TrainingError

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class TrainState:
    step: int = 0  # batches taken from the data, trained on or not
    updates: int = 0  # of the weights; the schedule follows these
    samples: int = 0  # packs taken from the data
    first_sample: int = 0  # where the data's order begins: not at 0 if files were added to it in the middle
    tokens: int = 0
    nonfinite_steps: int = 0  # whose gradient was not finite
    nonfinite_in_a_row: int = 0
    skipped_steps: int = 0  # left out by skip_batches
    validated_step: int = 0
    valid_loss: float | None = None

    def take(self, *, samples: int, tokens: int) -> None:
        """Count a batch taken from the data."""
        self.step += 1
        self.samples += samples
        self.tokens += tokens

    def read(self, counts: tuple[int, int, int]) -> int:
        """Take over the counts of the steps that were trained on; gives how many were bad since the last time."""
        before = self.nonfinite_steps
        self.updates, self.nonfinite_steps, self.nonfinite_in_a_row = counts
        return self.nonfinite_steps - before

    def state_dict(self) -> dict[str, int | float | None]:
        """Give everything as JSON has it, which knows no loss of nan."""
        known = self.valid_loss is not None and math.isfinite(self.valid_loss)
        return {**asdict(self), "valid_loss": self.valid_loss if known else None}


def check_bad_steps(progress: TrainState, limit: int, find_nonfinite_module: Callable[[], str]) -> None:
    """Tell of steps whose gradient was not finite; raises `TrainingError` after `limit` in a row."""
    logger.warning(
        "step %d: the gradient is not finite; nothing was changed (%d such steps, %d in a row, the run ends at %d)",
        progress.step,
        progress.nonfinite_steps,
        progress.nonfinite_in_a_row,
        limit,
    )
    if progress.nonfinite_in_a_row >= limit:
        raise TrainingError(
            f"{progress.nonfinite_in_a_row} steps in a row had no finite gradient (optimizer.max_nonfinite_steps), "
            f"first in {find_nonfinite_module()}; lower optimizer.lr, or skip the batches with skip_batches"
        )
