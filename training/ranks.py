"""Collective operations on checkpoints, in which a failure on one rank is raised on all."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from tracking.retry import retried
from training.config import CheckpointError, DamagedError, IncompleteError

T = TypeVar("T")


class Ranks:
    """The ranks of a process group, or a single process without one."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def all_gather(self, step: Callable[[], T]) -> list[T]:
        """Run `step` on every rank and return all results on every rank. A collective.

        Transient errors are retried. A failure on any rank raises the same `CheckpointError` or `DamagedError` on
        every rank; a missing file raises `IncompleteError`.
        """
        value, failure, cause = None, None, None
        try:
            value = retried(step)
        except (OSError, RuntimeError, CheckpointException, CheckpointError) as error:
            kind = type(error) if isinstance(error, DamagedError) else CheckpointError
            kind = IncompleteError if isinstance(error, FileNotFoundError) else kind
            where = f"rank {self.rank}: " if self.size > 1 else ""
            failure, cause = kind(where + reason_of(error)), error
        mine: Any = (value, failure)
        found = [mine] * self.size
        if self.size > 1:
            try:
                dist.all_gather_object(found, mine, group=self.group)
            except RuntimeError as error:
                raise CheckpointError(f"rank {self.rank} lost the others: {reason_of(error)}") from error
        if failed := next((failure for _, failure in found if failure), None):
            raise failed from cause
        return [value for value, _ in found]

    def on_first(self, step: Callable[[], T]) -> T:
        """Run `step` on rank 0 and return its result, or raise its failure, on every rank."""
        return self.all_gather(lambda: step() if self.rank == 0 else None)[0]  # type: ignore[return-value]


def reason_of(error: BaseException) -> str:
    """Return the first line of an error, with the rank of DCP's errors."""
    if isinstance(error, CheckpointException):
        rank, failure = next(iter(error.failures.items()))
        return f"rank {rank}: {reason_of(failure[0])}"
    return next(iter(str(error).splitlines()), type(error).__name__)


def some(names: Iterable[str]) -> str:
    """Return the first three names and the number of the others."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more or "none"
