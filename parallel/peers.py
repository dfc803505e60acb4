"""Memory that the ranks of a node read from each other by copy engines, which leaves all SMs to computation."""

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(slots=True)
class Buffer:
    """A flat buffer on this rank."""

    local: Tensor


class SharedBuffer(Buffer):
    """A flat buffer on each rank of a group, readable by all of them."""

    total_bytes: ClassVar[int] = 0  # of this process, which torch's allocator does not count
    timeout_s: ClassVar[float] = 0.0  # of a barrier; 0: none

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        self.rank, self.size = group.rank(), group.size()
        # torch (to 2.13 at least) zeroes the signals and writes its tables of addresses on the default stream, but
        # takes the tables from the current stream's pool, where pending kernels may still write (pytorch#181086).
        default = torch.cuda.default_stream(device)
        with torch.cuda.stream(default):
            self.local = symmetric.empty(n, dtype=dtype, device=device)
            default.synchronize()  # before a peer signals
            self.handle: Any = symmetric.rendezvous(self.local, group.group_name)
        torch.cuda.current_stream(device).wait_stream(default)
        SharedBuffer._count(self.local.nbytes)
        weakref.finalize(self, SharedBuffer._count, -self.local.nbytes)

    @classmethod
    def _count(cls, n_bytes: int) -> None:
        cls.total_bytes += n_bytes

    def of(self, rank: int, start: int, n: int) -> Tensor:
        """Return `n` elements of a rank's buffer, from `start` on."""
        return self.handle.get_buffer(rank, (n,), self.local.dtype, start)

    def others(self) -> list[int]:
        """Return the other ranks from the next one on, so that reads are spread over all of them."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def barrier(self) -> None:
        """Make the current stream wait until the streams of all ranks reach this barrier."""
        self.handle.barrier(channel=0, timeout_ms=int(1e3 * SharedBuffer.timeout_s))


class SideStream:
    """A stream for communication that overlaps with computation; synchronous without a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.stream: Any = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @contextmanager
    def after_current(self) -> Iterator[None]:
        """Run the context on this stream, after all work issued so far on the current one."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def event(self) -> Any:
        """Return an event recorded on this stream; None without a GPU."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, event: Any) -> None:
        """Make the current stream wait for an event of this one."""
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def join(self) -> None:
        """Make the current stream wait for all work issued on this one."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)


def weakly(method: Callable[[Any], None], argument: Any) -> Callable[[object], None]:
    """Return a hook that calls a method and keeps nothing alive: Python cannot collect cycles through autograd's."""
    weak_method: Any = weakref.WeakMethod(method)
    weak_argument = weakref.ref(argument)
    return lambda _: weak_method()(weak_argument())


def can_share(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return whether all ranks of a group are GPUs of one node that can read each other's memory."""
    if device.type != "cuda" or not torch.cuda.is_available() or group.size() == 1:
        return False
    # Launchers give consecutive ranks to a node, and the GPU index is the local rank.
    n_gpus = torch.cuda.device_count()
    n_local, ranks = int(os.environ.get("LOCAL_WORLD_SIZE", n_gpus)), dist.get_process_group_ranks(group)
    if n_local > n_gpus or len({rank // n_local for rank in ranks}) > 1:
        return False
    gpus = {rank % n_local for rank in ranks}  # all pairs, so that all ranks agree
    return all(torch.cuda.can_device_access_peer(a, b) for a in gpus for b in gpus if a != b)
