"""Consistency checks between ranks: the same configuration and code at the start, and identical replicas later."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor

from launch.sweep import code_files
from parallel.shards import local, sharded_dim
from training.config import TrainingError
from training.ranks import Ranks

Facts = dict[str, tuple[bool, tuple[int, ...]]]  # whether a tensor is finite, and hashes of its parts
CHECKED_AT_ONCE = 1 << 22  # elements, so that temporaries fit on a nearly full device


def check_same_run(facts: Mapping[str, Any], ranks: Ranks) -> None:
    """Raise `TrainingError` on every rank unless all have the same facts and the same code."""
    texts = {name: json.dumps(fact, sort_keys=True) for name, fact in {"code": code_files(), **facts}.items()}
    mine = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    first, *others = ranks.all_gather(lambda: mine)
    for rank, hashes in enumerate(others, 1):
        if other := [name for name in first if hashes[name] != first[name]]:
            raise TrainingError(f"rank {rank} has another {' and '.join(other)} than rank 0; start all ranks alike")


def check_tensors(tensors: Mapping[str, Tensor], ranks: Ranks, facts: Callable[[], Facts] | None = None) -> None:
    """Raise `TrainingError` on every rank unless all tensors are finite and replicas are bitwise equal.

    `facts` returns those of this rank's shards, if `tensors` have no data.
    """
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}

    def placed() -> dict[str, tuple[Any, bool, tuple[int, ...]]]:
        own = facts() if facts else facts_of({name: (local(tensor),) for name, tensor in floats.items()})
        return {name: (_place(tensor), *own[name]) for name, tensor in floats.items()}

    seen: dict[tuple[str, Any], tuple[int, tuple[int, ...]]] = {}
    for rank, shards in enumerate(ranks.all_gather(placed)):
        for name, (place, finite, digest) in shards.items():
            if not finite:
                raise TrainingError(f"{name} on rank {rank} is not finite")
            other, expected = seen.setdefault((name, place), (rank, digest))
            if digest != expected:
                both = f"the replicas of {name} on ranks {other} and {rank} differ"
                raise TrainingError(f"{both}; resume from a checkpoint, without the faulty GPU")


def _place(tensor: Tensor) -> tuple[int, ...] | None:
    """Return an id of the shard that this rank has, equal for replicas."""
    if not isinstance(tensor, DTensor):
        return None
    coordinate = tensor.device_mesh.get_coordinate() or []
    pairs = zip(coordinate, tensor.placements, strict=True)
    return tuple(-1 if sharded_dim(placement) is None else at for at, placement in pairs)


def facts_of(parts: Mapping[str, tuple[Tensor, ...]]) -> Facts:
    """Return whether tensors in parts are finite, and hashes of the parts' bits."""
    found = {name: [_finite_and_hash(part) for part in tensors] for name, tensors in parts.items()}
    return {name: (all(finite for finite, _ in pairs), tuple(h for _, h in pairs)) for name, pairs in found.items()}


def _finite_and_hash(shard: Tensor) -> tuple[bool, int]:
    """Return whether all elements are finite, and a hash of their bits."""
    flat = shard.contiguous().flatten()
    if flat.device.type == "cpu":  # several times as fast as the reductions below, which suit a GPU
        # A sum that is not finite may be an overflow.
        finite = bool(flat.sum(dtype=torch.float32).isfinite()) or bool(flat.isfinite().all())
        data: Any = flat.view(torch.uint8).numpy()
        return finite, xxhash.xxh3_64_intdigest(data)
    all_finite = torch.ones((), dtype=torch.bool, device=shard.device)
    total = torch.zeros((), dtype=torch.int64, device=shard.device)
    for part in flat.split(CHECKED_AT_ONCE):
        all_finite &= torch.isfinite(part).all()
        bits = part.view(torch.int32 if part.element_size() == 4 else torch.int16).long()
        total += (bits * bits + bits).sum()
    return bool(all_finite), int(total)
