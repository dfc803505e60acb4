"""The process group and device mesh of a run."""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from parallel.axes import Axes, resolve_axes
from parallel.config import Device, ParallelConfig, ParallelError
from parallel.peers import SharedBuffer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Mesh:
    """The ranks of a run and this rank's coordinates. A single rank has no process group."""

    device: torch.device
    axes: Axes = field(default_factory=Axes)
    rank: int = 0
    # Layout of parameters: (pp, dp_replicate, dp_shard, tp). cp is part of dp_shard here (dp_replicate if nothing is
    # sharded), because cp ranks sum gradients as data-parallel ranks do.
    param_mesh: DeviceMesh | None = None
    batch_mesh: DeviceMesh | None = None  # layout of tokens: (pp, dp, cp, tp)
    host: dist.ProcessGroup | None = None  # gloo group of all ranks, which does not synchronize devices

    @property
    def world_size(self) -> int:
        return self.axes.world_size

    @property
    def dp_size(self) -> int:
        return self.axes.dp

    @property
    def dp_rank(self) -> int:
        return self.coordinate("dp")

    def coordinate(self, axis: str) -> int:
        """This rank's coordinate on `pp`, `dp`, `cp` or `tp`."""
        return 0 if self.batch_mesh is None else self.batch_mesh.get_local_rank(axis)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, value: int) -> int:
        """Return the maximum over all ranks; a collective."""
        tensor = torch.tensor([value])
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.host)
        return int(tensor)

    def all_counts(self, counts: Sequence[int]) -> list[int]:
        """Return the counts of all data-parallel ranks' micro-batches, in step order; a collective."""
        found = torch.zeros(len(counts), self.dp_size, dtype=torch.int64)
        if not any(map(self.coordinate, ("pp", "cp", "tp"))):  # the other ranks have the same micro-batches
            found[:, self.dp_rank] = torch.tensor(counts)
        if self.world_size > 1:
            dist.all_reduce(found, group=self.host)
        return found.flatten().tolist()

    def on_rank_zero(self, call: Callable[..., object], *args: Any) -> None:
        if self.rank == 0:
            call(*args)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks; a collective."""
        values: list[T] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.host)
        return values


# Captured CUDA graphs. NCCL waits in silence until no graph has recorded a collective of a group that is destroyed.
GRAPHS: "WeakSet[torch.cuda.CUDAGraph]" = WeakSet()
# The store of the latest mesh. Its server stays, because the other ranks may join the next mesh before rank 0 does.
STORE: list[Any] = []


@contextmanager
def distributed(config: ParallelConfig) -> Iterator[Mesh]:
    """Open and close the mesh of a layout; raise `ParallelError` if the ranks cannot join."""
    axes = resolve_axes(config, int(os.environ.get("WORLD_SIZE", "1")))
    device, threads = _device(config), torch.get_num_threads()
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", str(axes.world_size)))
    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // local_ranks))
    try:
        if axes.world_size > 1:
            _join(config, device, axes.world_size)
        mesh = open_mesh(axes, zero_stage=config.zero_stage, device=device)
        SharedBuffer.timeout_s = config.step_timeout_s
        for group in list(dist.distributed_c10d._world.pg_map):  # new groups have torch's own timeout
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=config.step_timeout_s), group)
        yield mesh
    finally:
        if dist.is_initialized():
            leave()
        torch.set_num_threads(threads)


def open_mesh(axes: Axes, *, zero_stage: int, device: torch.device) -> Mesh:
    """Return the mesh over the open process group; a single rank needs none."""
    if axes.world_size == 1:
        return Mesh(device=device)
    ranks = torch.arange(axes.world_size)
    shard = axes.dp_shard * (axes.cp if zero_stage > 0 else 1)
    param_ranks, batch_ranks = ranks.view(axes.pp, -1, shard, axes.tp), ranks.view(axes.pp, -1, axes.cp, axes.tp)
    param_mesh = DeviceMesh(device.type, param_ranks, mesh_dim_names=("pp", "dp_replicate", "dp_shard", "tp"))
    batch_mesh = DeviceMesh(device.type, batch_ranks, mesh_dim_names=("pp", "dp", "cp", "tp"))
    host: Any = dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else dist.group.WORLD
    return Mesh(device=device, axes=axes, rank=dist.get_rank(), param_mesh=param_mesh, batch_mesh=batch_mesh, host=host)


def _device(config: ParallelConfig) -> torch.device:
    if config.device is Device.cuda and not torch.cuda.is_available():
        raise ParallelError("parallel.device (cuda): torch sees no CUDA device here; use parallel.device=cpu")
    if config.device is Device.cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _join(config: ParallelConfig, device: torch.device, world_size: int) -> None:
    """Join the other ranks in the default process group."""
    address, rank = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", os.environ["RANK"]
    timeout = timedelta(seconds=config.init_timeout_s)
    try:
        store, *_ = next(rendezvous("env://", timeout=timeout))
        STORE[:] = [store]
        store.set_timeout(timeout)
        # The points of a sweep, and ranks restarted by torchrun, reuse the store, so prefix the keys. With several
        # nodes the restart count cannot be used, because each node's torchrun counts separately.
        alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
        opened = store.add(f"opened/{attempt}/{rank}", 1)
        store, timeout = PrefixStore(f"{attempt}/{opened}", store), timedelta(seconds=config.step_timeout_s)
        # No device_id: with it, splitting the second group of a process crashes (torch 2.11, NCCL).
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=int(rank), world_size=world_size, timeout=timeout)
    except dist.DistError as error:
        raise ParallelError(
            f"RANK {rank} cannot join the {world_size} ranks (WORLD_SIZE) at {address} (MASTER_ADDR, MASTER_PORT) "
            f"within {config.init_timeout_s:g} s (parallel.init_timeout_s): {str(error).splitlines()[0]}"
        ) from None


def leave() -> None:
    """Close the process group, and clear DTensor's cache, so that the process can open another mesh."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache  # late: only several ranks need it

    for graph in GRAPHS:
        graph.reset()
    gc.collect()  # free what ranks share while all of them are here
    dist.destroy_process_group()
    _clear_sharding_prop_cache()
