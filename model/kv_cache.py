"""KV cache for decoding."""

import torch
from torch import Tensor

from model.config import ModelConfig


class KVCache:
    """Keys and values for `rows` texts of up to `max_len` tokens, written at each token's position.

    Rows may have different lengths: prompts are padded on the right, and the entries of the padding
    are overwritten before any query attends to them.
    """

    def __init__(self, config: ModelConfig, rows: int, max_len: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.n_layers, rows, max_len, config.n_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.row_B1 = torch.arange(rows, device=device)[:, None]
        self.positions_BT = torch.zeros(rows, 0, dtype=torch.int64, device=device)
        self.extent = 0  # length of the longest row
        self.mask_B1TS = torch.zeros(rows, 1, 0, 0, dtype=torch.bool, device=device)

    def set_positions(self, positions_BT: Tensor) -> None:
        """Set the positions of the next forward pass, once for all layers."""
        self.positions_BT = positions_BT
        self.extent = max(self.extent, int(positions_BT.max()) + 1)
        steps_S = torch.arange(self.extent, device=positions_BT.device)
        self.mask_B1TS = (steps_S <= positions_BT[..., None])[:, None]

    def update(self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values of a layer; return all of its keys and values, (B, S, G, K)."""
        self.keys[layer][self.row_B1, self.positions_BT] = k_BTGK
        self.values[layer][self.row_B1, self.positions_BT] = v_BTGK
        return self.keys[layer][:, : self.extent], self.values[layer][:, : self.extent]
