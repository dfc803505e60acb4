"""Norm, rotary embedding, MLP, the metadata and scaling of weights, and auxiliary losses.

A new MLP is a class like `SwiGLU`, chosen by `model.mlp=my_file:MyMLP`. It can also return auxiliary losses, as
`(out_BTD, {"name": scalar})`, and define `forward_flops`, as `SelfAttention` does.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from model.config import Init, ModelConfig


class ByDepth(float):
    """A standard deviation to divide by sqrt(2 (layer + 1)); layers count from 0."""


@dataclass(frozen=True, slots=True)
class Weight:
    """Metadata of a layer inside a module; the module's `WEIGHTS` has them by attribute name."""

    tp: Literal["colwise", "rowwise", "norm"]  # tensor parallelism: split outputs, inputs, or nothing
    hf: str | None = None  # name in Hugging Face's Llama; in a block, without model.layers.<i>
    internlm: float = 0.006  # initial standard deviation by `Init`
    internlm_v1: float = 0.006
    llama: float = 0.02

    def std(self, init: Init, layer: int) -> float:
        std: float = getattr(self, init.value)
        return std / (2 * (layer + 1)) ** 0.5 if isinstance(std, ByDepth) else std


class Scales(NamedTuple):
    """Factors of initial weights and updates, relative to a model of `base_width` and `base_depth`.

    CompleteP (Dey et al. 2025, arXiv:2505.01618, table 1, alpha = 1); `mup` is the same without the depth terms.
    The multipliers of the forward pass are in `ModelConfig`.
    """

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


class RMSNorm(nn.Module):
    """RMSNorm with statistics in fp32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.rms_norm(x_BTD, self.weight.shape, self.weight, self.eps)


def linears(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Return the outputs of layers for the same input; asynchronous tensor parallelism fuses them."""
    return [layer(x) for layer in layers]


class SwiGLU(nn.Module):
    """`w_down(silu(w_gate x) * w_up x)` (Shazeer 2020, arXiv:2002.05202)."""

    linears = staticmethod(linears)

    WEIGHTS: ClassVar = {  # standard deviations: internlm, internlm_v1, llama
        "w_gate": Weight("colwise", "mlp.gate_proj", 0.006, 0.006, 0.02),
        "w_up": Weight("colwise", "mlp.up_proj", 0.006, ByDepth(0.006), 0.02),
        "w_down": Weight("rowwise", "mlp.down_proj", ByDepth(0.006), 0.0015, ByDepth(0.02)),
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w_gate = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.w_up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.w_down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.linears(x_BTD, self.w_gate, self.w_up)
        return self.w_down(F.silu(gate_BTF) * up_BTF)


def rotary_angles(positions_BT: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary angles, fp32, (B, T, 1, K / 2) (Su et al. 2021, arXiv:2104.09864).

    They are computed on the fly, so that no table limits the sequence length.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions_BT.device, dtype=torch.float32) / head_dim
    angles = positions_BT.float()[..., None, None] * theta**-exponent
    return angles.cos(), angles.sin()


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding in fp32, in the half-split layout of Llama and InternLM."""
    first, second = x_BTHK.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(x_BTHK)


class AuxLosses:
    """Adds `weight` times each auxiliary loss, such as a load-balancing one, to the training loss; sums them by name.

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
