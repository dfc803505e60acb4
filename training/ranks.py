"""The processes that keep a checkpoint together: what fails on one of them is an error on all."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from training.config import CheckpointError

T = TypeVar("T")
R = TypeVar("R")


class Ranks:
    """The ranks of a process group; without one, this process alone."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def together(self, local: Callable[[], T], first: Callable[[list[T]], R]) -> R:
        """Run `local` on every rank, then `first` on rank 0 over all they gave, and give everybody its result.

        A failure on any rank is a `CheckpointError` on every rank. All ranks must call this alike.
        """
        mine, cause = _outcome(local)
        parts, answer = self._gather(mine), None
        if parts is not None:
            answer = next(((None, reason) for _, reason in parts if reason), None)
            if answer is None:
                answer, cause = _outcome(lambda: first([value for value, _ in parts]))
        value, reason = self._broadcast(answer)
        if reason:
            raise CheckpointError(reason) from cause
        return value

    def on_first(self, first: Callable[[], R]) -> R:
        """Run something on rank 0 and give everybody its result, or its failure."""
        return self.together(lambda: None, lambda _: first())

    def _gather(self, outcome: tuple[Any, str]) -> list[Any] | None:
        """Give rank 0 the outcomes of all ranks."""
        if self.size == 1:
            return [outcome]
        value, reason = outcome
        told = (value, f"rank {self.rank}: {reason}" if reason else "")
        found = [None] * self.size if self.rank == 0 else None
        self._talk(lambda: dist.gather_object(told, found, group=self.group, group_dst=0))
        return found

    def _broadcast(self, value: Any) -> Any:
        if self.size == 1:
            return value
        box = [value]
        self._talk(lambda: dist.broadcast_object_list(box, group=self.group, group_src=0))
        return box[0]

    def _talk(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise CheckpointError(f"rank {self.rank} lost the others: {reason_of(error)}") from error


def _outcome(step: Callable[[], Any]) -> tuple[tuple[Any, str], BaseException | None]:
    """Give what a step gives and an empty reason, or nothing and the reason of its failure."""
    try:
        return (step(), ""), None
    except (OSError, RuntimeError, CheckpointException, CheckpointError) as error:
        return (None, reason_of(error)), error


def reason_of(error: BaseException) -> str:
    """Say in one line what went wrong, and on which rank if the error knows it."""
    if isinstance(error, CheckpointException):
        rank, failure = next(iter(error.failures.items()))
        reason = reason_of(failure[0])
        return f"rank {rank}: {reason}" if len(error.failures) > 1 or rank else reason
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def some(names: set[str]) -> str:
    """Name the first three, and count the rest."""
    shown = ", ".join(sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"
