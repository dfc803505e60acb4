"""Auxiliary losses of layers, such as a router's load balance."""

from typing import Any

import torch
from torch import Tensor


class AuxLosses:
    """Adds auxiliary losses to the backward pass of one micro-batch, and sums them by name."""

    def __init__(self, weight: float | Tensor) -> None:
        self.weight = weight
        self.sums: dict[str, Tensor] = {}

    def attach(self, x: Tensor, losses: dict[str, Tensor]) -> Tensor:
        """Return x, whose backward pass adds the gradient of `weight` times each loss."""
        if torch._C._current_graph_task_id() == -1:  # not a repetition by activation checkpointing
            for name, loss in losses.items():
                value: Any = loss.detach()
                value = value.to_local() if hasattr(value, "to_local") else value
                self.sums[name] = self.sums[name] + value if name in self.sums else value
        attached: Any = _Attach.apply(x, self.weight, *losses.values())
        return attached


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float | Tensor, *losses: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.ones = [torch.ones_like(loss) for loss in losses]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, None, *(one * ctx.weight for one in ctx.ones)
