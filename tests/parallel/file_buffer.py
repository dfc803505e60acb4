"""Memory that ranks share in files, in place of that of GPUs which read each other's."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel import async_tp, zero
from parallel.peers import Buffer


class FileBuffer(Buffer):
    folder = Path()
    count = 0  # of buffers that this process has made: ranks of a group make them in the same order

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup) -> None:
        FileBuffer.count += 1
        self.rank, self.size, self.group, self.n, self.dtype = group.rank(), group.size(), group, n, dtype
        self.name = f"{dist.get_process_group_ranks(group)}-{self.count}"
        self.local = self.of(self.rank, 0, n)
        dist.barrier(group)

    def of(self, rank: int, start: int, n: int) -> Tensor:
        path = str(self.folder / f"{self.name}-{rank}")
        return torch.from_file(path, shared=True, size=self.n, dtype=self.dtype)[start : start + n]

    def others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def barrier(self) -> None:
        dist.barrier(self.group)


@contextmanager
def shared_files(folder: Path) -> Iterator[None]:
    """Let ZeRO and asynchronous tensor parallelism share memory on CPUs."""
    folder.mkdir(exist_ok=True)
    FileBuffer.folder, FileBuffer.count = folder, 0
    with pytest.MonkeyPatch.context() as patches:
        for module in (async_tp, zero):
            patches.setattr(module, "can_share", lambda group, device: group.size() > 1)
            patches.setattr(module, "SharedBuffer", FileBuffer)
        yield
