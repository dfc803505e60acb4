"""Norm, rotary embedding, MLP, and the metadata of weights.

A new MLP is a class like `SwiGLU`, chosen by `model.mlp=my_file:MyMLP`. It can also return auxiliary losses, as
`(out_BTD, {"name": scalar})`, and define `forward_flops`, as `SelfAttention` does.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
