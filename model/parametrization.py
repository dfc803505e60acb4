"""How initial weights and updates follow a model's width and depth, so that a small model's settings fit a large one.

CompleteP (Dey et al. 2025, arXiv:2505.01618, table 1, with alpha = 1); `mup` is the same without its terms of depth.
What the forward pass needs, `Block` and `Transformer` take from `ModelConfig`.
"""

from typing import NamedTuple

from model.config import ModelConfig


class Scales(NamedTuple):
    """Factors on what is set for a model of `base_width` and `base_depth`."""

    std: float = 1.0  # of the initial weights
    lr: float = 1.0
    weight_decay: float = 1.0  # its product with the rate stays
    eps: float = 1.0


def scales_of(config: ModelConfig, name: str, n_dims: int) -> Scales:
    """Return the factors of a parameter, for AdamW."""
    width, depth = config.width_ratio, config.depth_ratio
    if not name.startswith("blocks."):
        return Scales(eps=1 / width)
    if n_dims == 1:
        return Scales(eps=1 / (width * depth))
    return Scales(std=width**-0.5, lr=1 / width, weight_decay=width, eps=1 / (width * depth))
