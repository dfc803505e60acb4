"""AdamW on fp32 master weights, whatever the dtype the model computes in."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from training.config import Decay, OptimizerConfig

# Parameters updated by one call: enough for a full launch, little enough that their fp32
# gradients are a small part of memory.
CHUNK_NUMEL = 1 << 27


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) that keeps what the model's dtype would lose.

    The masters are fp32; a parameter that is fp32 is its own master. Weight decay is decoupled.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self.params = dict(model.named_parameters())
        self.masters = {
            name: param.detach() if param.dtype == torch.float32 else param.detach().float()
            for name, param in self.params.items()
        }
        self.exp_avg = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        self.steps = {name: torch.zeros((), device=m.device) for name, m in self.masters.items()}

    def decayed(self, name: str) -> bool:
        """Say whether weight decay applies to a parameter."""
        return self.config.decay is Decay.all or self.params[name].ndim >= 2

    @torch.no_grad()
    def step(self, *, lr: float, beta2: float, grad_scale: Tensor) -> None:
        """Update from the parameters' gradients divided by `grad_scale`, and drop the gradients."""
        for names, weight_decay in self._chunks():
            masters = [self.masters[name] for name in names]
            adamw(
                masters,
                [_gradient(self.params[name]) for name in names],
                [self.exp_avg[name] for name in names],
                [self.exp_avg_sq[name] for name in names],
                [],
                [self.steps[name] for name in names],
                fused=True,
                grad_scale=grad_scale,
                amsgrad=False,
                beta1=self.config.beta1,
                beta2=beta2,
                lr=lr,
                weight_decay=weight_decay,
                eps=self.config.eps,
                maximize=False,
            )
            params: list[Tensor] = [self.params[name] for name in names]
            if params[0].dtype != torch.float32:
                torch._foreach_copy_(params, masters)  # type: ignore[attr-defined]
            for param in params:
                param.grad = None

    def _chunks(self) -> Iterator[tuple[list[str], float]]:
        """Names that share a decay, in groups of about `CHUNK_NUMEL` numbers."""
        for decayed in (True, False):
            weight_decay = self.config.weight_decay if decayed else 0.0
            names: list[str] = []
            numel = 0
            for name, param in self.params.items():
                if self.decayed(name) != decayed:
                    continue
                if names and numel + param.numel() > CHUNK_NUMEL:
                    yield names, weight_decay
                    names, numel = [], 0
                names.append(name)
                numel += param.numel()
            if names:
                yield names, weight_decay

    def tensors(self) -> dict[str, Tensor]:
        """Everything to keep, by checkpoint name: master weights, moments and their step counts."""
        kept = {}
        for name in self.params:
            kept[f"model.{name}"] = self.masters[name]
            kept[f"optimizer.{name}.exp_avg"] = self.exp_avg[name]
            kept[f"optimizer.{name}.exp_avg_sq"] = self.exp_avg_sq[name]
            kept[f"optimizer.{name}.step"] = self.steps[name]
        return kept

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters into the model, after they were loaded."""
        for name, param in self.params.items():
            if param.dtype != torch.float32:
                param.copy_(self.masters[name])


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None, "an update needs every gradient"
    return param.grad.float()
