"""The processes and devices of a run: opened before anything else and closed after it, once for every sweep point."""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from parallel.axes import Axes, resolve_axes
from parallel.config import Device, ParallelConfig, ParallelError

T = TypeVar("T")
GRACE_S = 10  # that a rank which serves the others waits for them before it ends


@dataclass(frozen=True, slots=True)
class Mesh:
    """Where this process stands. Every axis exists at size 1; alone, a process talks to nobody."""

    device: torch.device
    axes: Axes = field(default_factory=Axes)
    rank: int = 0
    # (pp, dp_replicate, dp_shard, tp): what parameters are laid out on. Who shares the tokens of a sequence still has
    # samples' gradients to sum, so cp is a part of dp_shard here (of dp_replicate if nothing is sharded).
    param_mesh: DeviceMesh | None = None
    batch_mesh: DeviceMesh | None = None  # (pp, dp, cp, tp): who sees which tokens
    host: dist.ProcessGroup | None = None  # all processes, without waiting for their devices

    @property
    def world_size(self) -> int:
        return self.axes.world_size

    @property
    def dp_size(self) -> int:
        return self.axes.dp

    @property
    def dp_rank(self) -> int:
        return self.coordinate("dp")

    @property
    def maximum(self) -> Callable[[int], int] | None:
        """The largest of all ranks' values; None for a rank alone."""
        return None if self.world_size == 1 else self.all_reduce_max

    def coordinate(self, axis: str) -> int:
        """This process's coordinate on `pp`, `dp`, `cp` or `tp`."""
        return 0 if self.batch_mesh is None else self.batch_mesh.get_local_rank(axis)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, value: int) -> int:
        """Give the largest of the values the processes pass; every process must ask."""
        tensor = torch.tensor([value])
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.host)
        return int(tensor)

    def all_counts(self, counts: Sequence[int]) -> list[int]:
        """Give the counts of every data-parallel rank's micro-batches in the order of the step, from this rank's."""
        if self.world_size == 1:
            return list(counts)
        found = torch.zeros(len(counts), self.dp_size, dtype=torch.int64)
        if (
            self.coordinate("cp") == self.coordinate("tp") == self.coordinate("pp") == 0
        ):  # peers have the same micro-batches
            found[:, self.dp_rank] = torch.tensor(counts)
        dist.all_reduce(found, group=self.host)
        return found.flatten().tolist()

    def on_rank_zero(self, call: Callable[..., object], *args: Any) -> None:
        """Call something on the first process alone."""
        if self.rank == 0:
            call(*args)

    def gather(self, value: T) -> list[T]:
        """Give what every process passes, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value, group=self.host)
        return values


@contextmanager
def distributed(config: ParallelConfig) -> Iterator[Mesh]:
    """Open the mesh a layout asks for and close it again; raises `ParallelError` if it cannot be."""
    axes = resolve_axes(config, int(os.environ.get("WORLD_SIZE", "1")))
    device = _device(config)
    threads = torch.get_num_threads()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(axes.world_size)))
    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // local))
    try:
        with _process_group(config, device, axes.world_size):
            yield open_mesh(axes, zero_stage=config.zero_stage, device=device)
    finally:
        torch.set_num_threads(threads)


def open_mesh(axes: Axes, *, zero_stage: int, device: torch.device) -> Mesh:
    """Lay the axes over the process group that is open; none is needed for a single process."""
    if axes.world_size == 1:
        return Mesh(device=device)
    ranks = torch.arange(axes.world_size)
    sharded = zero_stage > 0
    dp_cp = (axes.dp_replicate * (1 if sharded else axes.cp), axes.dp_shard * (axes.cp if sharded else 1))
    param_mesh = DeviceMesh(
        device.type, ranks.view(axes.pp, *dp_cp, axes.tp), mesh_dim_names=("pp", "dp_replicate", "dp_shard", "tp")
    )
    batch_mesh = DeviceMesh(
        device.type, ranks.view(axes.pp, axes.dp, axes.cp, axes.tp), mesh_dim_names=("pp", "dp", "cp", "tp")
    )
    host: Any = dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else dist.group.WORLD
    return Mesh(device=device, axes=axes, rank=dist.get_rank(), param_mesh=param_mesh, batch_mesh=batch_mesh, host=host)


def _device(config: ParallelConfig) -> torch.device:
    if config.device is Device.cuda and not torch.cuda.is_available():
        raise ParallelError("parallel.device (cuda): torch sees no CUDA device here; use parallel.device=cpu")
    if config.device is Device.cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, n_devices = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())), torch.cuda.device_count()
    if local_rank >= n_devices:
        raise ParallelError(
            f"LOCAL_RANK ({local_rank}) has no device: torch sees {n_devices} here; start {n_devices} processes on "
            "this machine, as in torchrun --nproc-per-node"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextmanager
def _process_group(config: ParallelConfig, device: torch.device, world_size: int) -> Iterator[None]:
    """Join the other processes and leave them again."""
    if world_size == 1:
        yield
        return
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    late = (
        f"the {world_size} processes (WORLD_SIZE) did not all join at {where} within {config.init_timeout_s:g} s "
        f"(parallel.init_timeout_s); RANK {os.environ['RANK']} waited"
    )
    try:
        timeout = timedelta(seconds=config.init_timeout_s)
        _wait_for_listener(config.init_timeout_s, late)
        store, rank, _ = next(rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        _agree_on_world_size(store, rank, world_size)
        opened = store.add(f"opened/{rank}", 1)  # a sweep opens many groups over one store, which must not meet
        # Without device_id: with it, a second group in the life of a process dies while it is split (torch 2.11, NCCL).
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore(str(opened), store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=config.step_timeout_s),
        )
    except dist.DistStoreError as error:
        raise ParallelError(f"{late}: {_first_line(error)}") from None
    except (dist.DistNetworkError, dist.DistBackendError) as error:
        raise ParallelError(
            f"RANK {os.environ['RANK']} cannot join at {where} (MASTER_ADDR, MASTER_PORT): {_first_line(error)}; "
            "choose a free port"
        ) from None
    try:
        yield
    finally:
        leave()


def _wait_for_listener(timeout_s: float, late: str) -> None:
    """Wait until rank 0 listens: torch's own wait ends in pages of its insides."""
    until = time.monotonic() + timeout_s
    while os.environ["RANK"] != "0":
        try:
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout_s).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise ParallelError(f"{late}: RANK 0 does not listen there ({error.strerror or error})") from None
        time.sleep(0.2)


def _agree_on_world_size(store: Any, rank: int, world_size: int) -> None:
    """Raise `ParallelError` if ranks were started with other numbers of them; they would wait in vain."""
    store.set(f"world_size/{rank}", str(world_size))
    others = range(world_size) if rank == 0 else range(1)
    sizes = [int(value) for value in store.multi_get([f"world_size/{other}" for other in others])]
    store.set(f"world_size_read/{rank}", "")
    for other, size in zip(others, sizes, strict=True):
        if size != world_size:
            if rank == 0:  # which may serve the store: the others are to read of it too before it ends
                with suppress(dist.DistError):
                    store.wait([f"world_size_read/{other}" for other in others], timedelta(seconds=GRACE_S))
            raise ParallelError(
                f"WORLD_SIZE ({world_size}) of RANK {rank} must be that of every rank, and RANK {other} has "
                f"{size}; start all of them with the same"
            )


def leave() -> None:
    """Close the process group, and let DTensor forget the layouts it has seen: they name groups that are closed."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache  # late: only several ranks need it

    dist.destroy_process_group()
    _clear_sharding_prop_cache()  # private, but there is no other way to have two meshes in the life of a process


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
