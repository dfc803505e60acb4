"""Memory that the ranks of a node read from each other by copy engines: messages that take no multiprocessor."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(slots=True)
class Buffer:
    """A flat buffer of this rank."""

    mine: Tensor


class SharedBuffer(Buffer):
    """A flat buffer of every rank of a group, each of which the others can read."""

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        self.rank, self.size = group.rank(), group.size()
        self.mine = symmetric.empty(n, dtype=dtype, device=device)
        self.handle: Any = symmetric.rendezvous(self.mine, group.group_name)

    def of(self, rank: int, start: int, n: int) -> Tensor:
        """Return `n` numbers of a rank's buffer."""
        return self.handle.get_buffer(rank, (n,), self.mine.dtype, start)

    def others(self) -> list[int]:
        """Return the other ranks, beginning with the next one, so that no rank is read by all at once."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def barrier(self) -> None:
        """Let the current stream wait until every rank's stream is here."""
        self.handle.barrier(channel=0)


class SideStream:
    """A stream for messages beside the one that computes. Without a GPU everything happens in order."""

    def __init__(self, device: torch.device) -> None:
        self.stream: Any = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Issue work on this stream, after what the current one has issued so far."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def event(self) -> Any:
        """Return an event after what was issued on this stream; None without a GPU."""
        if self.stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self.stream)
        return event

    def wait(self, event: Any) -> None:
        """Let the current stream wait for an event of this one."""
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def join(self) -> None:
        """Let the current stream wait for all that was issued on this one."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)


def can_share(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return whether all ranks of a group are GPUs of one node that can read each other's memory."""
    if device.type != "cuda" or not torch.cuda.is_available() or group.size() == 1:
        return False
    # Launchers number the ranks of a node without gaps, and a rank's GPU is its number on the node.
    n_gpus = torch.cuda.device_count()
    n_here, ranks = int(os.environ.get("LOCAL_WORLD_SIZE", n_gpus)), dist.get_process_group_ranks(group)
    if n_here > n_gpus or len({rank // n_here for rank in ranks}) > 1:
        return False
    here = torch.cuda.current_device()
    return all(torch.cuda.can_device_access_peer(here, rank % n_here) for rank in ranks if rank % n_here != here)
