"""Micro-batches: packs side by side, as tensors."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from data.packing import Pack


@dataclass(slots=True)
class Batch:
    """One micro-batch of B packs of T tokens; CPU tensors, pinned when asked for."""

    tokens_BT: Tensor  # int64
    labels_BT: Tensor  # int64, already shifted: the target of each token, -100 for none
    positions_BT: Tensor  # int64, from 0 in each segment
    source_BT: Tensor  # int64, index into the corpus' sources
    cu_seqlens: Tensor  # int32 (n_segments + 1,), over the flattened batch, from 0 to B * T
    max_seq_len: int  # the longest segment

    def pin_memory(self) -> "Batch":
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                setattr(self, field.name, value.pin_memory())
        return self


def collate(packs: list[Pack]) -> Batch:
    """Put packs into one micro-batch."""
    lens = [length for pack in packs for length in pack.segment_lens]
    tokens_BT = torch.from_numpy(np.stack([pack.tokens_T for pack in packs]))
    source_B1 = torch.tensor([[pack.source] for pack in packs])
    return Batch(
        tokens_BT=tokens_BT,
        labels_BT=torch.from_numpy(np.stack([pack.labels_T for pack in packs])),
        positions_BT=torch.from_numpy(np.stack([pack.positions_T for pack in packs])),
        source_BT=source_B1.expand_as(tokens_BT).contiguous(),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lens]).astype(np.int32)),
        max_seq_len=max(lens),
    )
