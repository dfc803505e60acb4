"""Packed micro-batches of random tokens."""

import torch

from data.batches import Batch


def micro_batch(lengths: list[int], seed: int, *, ignored: int = 1, source: int = 0) -> Batch:
    """Return one row of segments of these lengths; its first `ignored` tokens have no target."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    tokens_BT, labels_BT = torch.randint(0, 64, (2, 1, total), generator=generator, dtype=torch.int32)
    labels_BT[:, :ignored] = -100
    return Batch(
        tokens_BT=tokens_BT,
        labels_BT=labels_BT,
        positions_BT=torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])[None],
        source_BT=torch.full((1, total), source, dtype=torch.int32),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seq_len=max(lengths),
    )
