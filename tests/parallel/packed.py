"""Packed micro-batches of random tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Packed:
    tokens_BT: Tensor
    labels_BT: Tensor
    positions_BT: Tensor
    source_BT: Tensor
    cu_seqlens: Tensor
    max_seq_len: int


def micro_batch(lengths: list[int], seed: int, *, ignored: int = 1, source: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    tokens_BT = torch.randint(0, 64, (1, total), generator=generator)
    labels_BT = torch.randint(0, 64, (1, total), generator=generator)
    labels_BT[:, :ignored] = -100
    positions_BT = torch.cat([torch.arange(n) for n in lengths])[None]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return Packed(tokens_BT, labels_BT, positions_BT, torch.full((1, total), source), cu_seqlens, max(lengths))
