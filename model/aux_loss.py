"""Auxiliary losses that a layer adds to the training loss, such as a load-balancing loss of its experts."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class AuxLosses:
    """Adds `weight` times each auxiliary loss to the training loss, and sums the losses by name.

    A loss is attached to the hidden states of its layer, so that it is part of the backward pass of a pipeline stage
    without the head too.
    """

    def __init__(self, weight: float | Tensor) -> None:
        self.weight = weight
        self.sums: dict[str, Tensor] = {}  # detached, by name, over layers and forward passes

    def attach(self, x_BTD: Tensor, losses: dict[str, Tensor]) -> Tensor:
        """Return x_BTD such that its backward pass also gives each loss the gradient `weight`."""
        for name, value in losses.items():
            attached: Any = _Attach.apply(x_BTD, value.float() * self.weight)
            x_BTD = attached
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        return x_BTD


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: FunctionCtx, x: Tensor, _loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, torch.ones((), device=grad.device)
