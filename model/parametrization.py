"""Scaling of initial weights and updates with width and depth, so that hyperparameters transfer between model sizes.

CompleteP (Dey et al. 2025, arXiv:2505.01618, table 1, alpha = 1); `mup` is the same without the depth terms.
The multipliers of the forward pass are in `ModelConfig`.
"""

from typing import NamedTuple

from model.config import ModelConfig


class Scales(NamedTuple):
    """Factors relative to a model of `base_width` and `base_depth`."""

    std: float = 1.0  # of the initial weights
    lr: float = 1.0
    weight_decay: float = 1.0  # keeps lr * weight_decay
    eps: float = 1.0


def scales_of(config: ModelConfig, name: str, n_dims: int) -> Scales:
    """Return a parameter's factors for AdamW."""
    width, depth = config.width_ratio, config.depth_ratio
    if not name.startswith("blocks."):
        return Scales(eps=1 / width)
    if n_dims == 1:
        return Scales(eps=1 / (width * depth))
    return Scales(std=width**-0.5, lr=1 / width, weight_decay=width, eps=1 / (width * depth))
