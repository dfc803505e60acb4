"""How far a run has come: the integers that a checkpoint keeps and a resumed run starts from."""

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Progress:
    step: int = 0  # batches taken from the data, trained on or not
    updates: int = 0  # of the weights; the schedule follows these
    samples: int = 0  # packs taken from the data
    tokens: int = 0
    bad_steps: int = 0  # whose gradient was not finite
    bad_in_a_row: int = 0
    skipped_steps: int = 0  # left out by skip_batches
    validated_step: int = 0
    valid_loss: float | None = None

    def take(self, *, samples: int, tokens: int) -> None:
        """Count a batch taken from the data."""
        self.step += 1
        self.samples += samples
        self.tokens += tokens

    def count(self, *, finite: bool) -> None:
        """Count a step that was trained on."""
        self.updates += finite
        self.bad_steps += not finite
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1

    def state_dict(self) -> dict[str, int | float | None]:
        return asdict(self)
