"""Micro-batches as tensors."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from data.packing import Rows

IGNORED = -100


@dataclass(slots=True)
class Batch:
    """One micro-batch of B packs of T tokens; CPU tensors of int32."""

    tokens_BT: Tensor
    labels_BT: Tensor  # already shifted; -100: no target
    positions_BT: Tensor  # from 0 in each segment
    source_BT: Tensor  # index into the corpus' sources
    cu_seqlens: Tensor  # (n_segments + 1,), over the flattened batch, from 0 to B * T
    max_seq_len: int  # length of the longest segment

    def pin_memory(self) -> "Batch":
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                setattr(self, field.name, value.contiguous().pin_memory())  # an expanded view cannot be pinned
        return self


def collate(rows: Rows, sources: np.ndarray, *, seq_len: int, isolated: bool) -> Batch:
    """Return the micro-batch of rows; sources: int64 (B,).

    The target of a token is the next token of its document, even across a segment boundary; the last token of a
    document has none. Tokens attend within segments: with `isolated`, documents, split every `seq_len` tokens;
    without, every `seq_len` tokens of the pack, whose last target is dropped, as in InternLM's
    `pack_sample_into_one`. Padding is a segment of its own.
    """
    n_rows, pack_len = rows.tokens.shape[0], rows.tokens.shape[1] - 1
    tokens, labels = rows.tokens[:, :-1], rows.tokens[:, 1:].copy()
    row_starts = np.arange(n_rows) * pack_len
    ends = rows.ends + np.repeat(row_starts, rows.n_ends)
    if rows.loss_mask is not None:
        labels[~rows.loss_mask[:, 1:]] = IGNORED
    labels.reshape(-1)[ends - 1] = IGNORED
    for row in np.flatnonzero(rows.used < pack_len).tolist():
        labels[row, rows.used[row] :] = IGNORED
    if isolated:
        limits = np.sort(np.concatenate([ends, row_starts + rows.used, row_starts + pack_len]))
        limits = limits[np.diff(limits, prepend=-1) > 0]  # np.unique takes three times as long
    else:
        labels[:, -1] = IGNORED
        limits = row_starts + pack_len
    lengths = np.diff(limits, prepend=0)
    if (lengths > seq_len).any():
        lengths = _split(lengths, seq_len)
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(n_rows * pack_len, dtype=np.int32)
    positions -= np.repeat(starts.astype(np.int32), lengths)
    return Batch(
        tokens_BT=torch.from_numpy(tokens),
        labels_BT=torch.from_numpy(labels),
        positions_BT=torch.from_numpy(positions.reshape(n_rows, pack_len)),
        source_BT=torch.from_numpy(sources.astype(np.int32))[:, None].expand(-1, pack_len),
        cu_seqlens=torch.from_numpy(np.append(starts, n_rows * pack_len).astype(np.int32)),
        max_seq_len=int(lengths.max()),
    )


def _split(lengths: np.ndarray, longest: int) -> np.ndarray:
    """Split each length into parts of `longest` and a remainder."""
    parts = -(-lengths // longest)
    split = np.full(int(parts.sum()), longest)
    split[np.cumsum(parts) - 1] = lengths - (parts - 1) * longest
    return split
