"""Consistency checks between ranks: the same configuration and code at the start, and identical replicas later."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor

from launch.sweep import code_files
from parallel.shards import local, sharded_dim
from training.config import TrainingError
from training.ranks import Ranks

CHECKED_AT_ONCE = 1 << 22  # elements, so that temporaries fit on a nearly full device


def check_same_run(facts: Mapping[str, Any], ranks: Ranks) -> None:
    """Raise `TrainingError` on every rank unless all have the same facts and the same code."""
    texts = {name: json.dumps(fact, sort_keys=True) for name, fact in {"code": code_files(), **facts}.items()}
    mine = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    first, *others = ranks.all_gather(lambda: mine)
    for rank, hashes in enumerate(others, 1):
        if other := [name for name in first if hashes[name] != first[name]]:
            raise TrainingError(f"rank {rank} has another {' and '.join(other)} than rank 0; start all ranks alike")


def check_tensors(tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Raise `TrainingError` on every rank unless all tensors are finite and replicas are bitwise equal."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    mine = {name: (_place(tensor), *_finite_and_hash(local(tensor))) for name, tensor in floats.items()}
    seen: dict[tuple[str, Any], tuple[int, int]] = {}
    for rank, shards in enumerate(ranks.all_gather(lambda: mine)):
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


def _finite_and_hash(shard: Tensor) -> tuple[bool, int]:
    """Return whether all elements are finite, and a hash of their bits."""
    flat = shard.contiguous().flatten()
    if flat.device.type == "cpu":  # several times as fast as the reductions below, which suit a GPU
        finite = bool(flat.sum().isfinite()) or bool(flat.isfinite().all())  # the sum of finite ones may overflow
        return finite, xxhash.xxh3_64_intdigest(flat.view(torch.uint8).numpy())
    all_finite = torch.ones((), dtype=torch.bool, device=shard.device)
    total = torch.zeros((), dtype=torch.int64, device=shard.device)
    for part in flat.split(CHECKED_AT_ONCE):
        all_finite &= torch.isfinite(part).all()
        bits = part.view(torch.int32 if part.element_size() == 4 else torch.int16).long()
        total += (bits * bits + bits).sum()
    return bool(all_finite), int(total)
