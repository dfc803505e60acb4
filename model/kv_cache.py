"""Keys and values of the tokens read so far, so that decoding computes each token once."""

import torch
from torch import Tensor

from model.config import ModelConfig


class KVCache:
    """Keys and values for `rows` texts of up to `max_len` tokens, written at each token's position.

    Rows may hold texts of different length: a prompt shorter than its batch is padded on the right,
    and what the padding wrote is overwritten before any query may look at it.
    """

    def __init__(self, config: ModelConfig, rows: int, max_len: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.n_layers, rows, max_len, config.n_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.row_B1 = torch.arange(rows, device=device)[:, None]
        self.positions_BT = torch.zeros(rows, 0, dtype=torch.int64, device=device)
        self.extent = 0  # positions any row has reached
        self.mask_B1TS = torch.zeros(rows, 1, 0, 0, dtype=torch.bool, device=device)

    def set_positions(self, positions_BT: Tensor) -> None:
        """Set where the tokens of the next forward pass stand; once for all layers."""
        self.positions_BT = positions_BT
        self.extent = max(self.extent, int(positions_BT.max()) + 1)
        steps_S = torch.arange(self.extent, device=positions_BT.device)
        self.mask_B1TS = (steps_S <= positions_BT[..., None])[:, None]

    def update(self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values and return all of a layer's so far, (B, S, G, K)."""
        self.keys[layer][self.row_B1, self.positions_BT] = k_BTGK
        self.values[layer][self.row_B1, self.positions_BT] = v_BTGK
        return self.keys[layer][:, : self.extent], self.values[layer][:, : self.extent]
