"""AdamW with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

import importlib.util
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from parallel.shards import ParamShard
from training.config import OptimizerConfig, OptimizerImpl, TrainingError
from training.optim.master_weights import MasterWeights
from training.optim.optimizer import Chunk, Group, State, UpdateRule, gradient


class AdamW(UpdateRule):
    """Equal to torch.optim.AdamW on fp32 parameters, bit for bit for `impl` triton (on CUDA) and torch."""

    state_names = ("exp_avg", "exp_avg_sq")
    separable = True

    def __init__(self, config: OptimizerConfig, params: Mapping[str, ParamShard]) -> None:
        super().__init__(config, params)
        self.impl = resolve_impl(config.impl, next(iter(params.values())).shard.device)
        self.on_device = self.impl is OptimizerImpl.triton

    def rates(self, lr: float, beta2: float, update: int) -> tuple[float, ...]:
        return lr, beta2, lr / (1 - self.config.beta1**update), math.sqrt(1 - beta2**update)

    def update_raw(
        self, weights: MasterWeights, state: State, names: list[str], group: Group, rates: Tensor,
        grad_scale: Tensor, finite: Tensor,
    ) -> None:  # fmt: skip
        from training.optim.adamw_kernel import update

        lr, beta2, step_size, bias_correction2_sqrt = rates.unbind()
        # fp64 until here, as torch.optim.AdamW has its scalars
        row = (1 - lr * group.weight_decay, beta2, 1 - beta2, -step_size, 1 / bias_correction2_sqrt)
        row_7 = torch.stack([grad_scale.double(), finite.double(), *row]).float()
        for name in names:
            tensors = weights.shards[name], weights.remainder.get(name), gradient(weights.params[name])
            moments = state["exp_avg"][name], state["exp_avg_sq"][name]
            update(*tensors, *moments, row_7, beta1=self.config.beta1, eps=group.eps)

    def update(self, chunk: Chunk) -> None:
        if self.impl is OptimizerImpl.apex:
            return self._update_by_apex(chunk)
        steps = [torch.full_like(chunk.grad_scale, chunk.update - 1) for _ in chunk.names]
        adamw(
            chunk.masters, chunk.scaled_grads, chunk.state["exp_avg"], chunk.state["exp_avg_sq"], [], steps,
            fused=True, grad_scale=chunk.grad_scale, amsgrad=False, maximize=False, lr=chunk.lr, beta2=chunk.beta2,
            beta1=self.config.beta1, weight_decay=chunk.weight_decay, eps=chunk.eps,
        )  # fmt: skip

    def _update_by_apex(self, chunk: Chunk) -> None:
        import amp_C  # type: ignore[import-not-found]
        from apex.multi_tensor_apply import multi_tensor_applier  # type: ignore[import-not-found]

        overflow = torch.zeros(1, dtype=torch.int32, device=chunk.grad_scale.device)
        tensors: Any = [chunk.grads, chunk.masters, chunk.state["exp_avg"], chunk.state["exp_avg_sq"]]
        decoupled, bias_correction = 1, 1
        multi_tensor_applier(
            amp_C.multi_tensor_adam, overflow, tensors, chunk.lr, self.config.beta1, chunk.beta2, chunk.eps,
            chunk.update, decoupled, bias_correction, chunk.weight_decay,
        )  # fmt: skip


def resolve_impl(asked: OptimizerImpl, device: torch.device) -> OptimizerImpl:
    """Return the implementation to use; raise `TrainingError` if the requested one is not available."""
    package = {OptimizerImpl.triton: "triton", OptimizerImpl.apex: "amp_C"}.get(asked, "triton")
    usable = device.type == "cuda" and importlib.util.find_spec(package) is not None
    if asked is OptimizerImpl.auto:
        return OptimizerImpl.triton if usable else OptimizerImpl.torch
    if asked is not OptimizerImpl.torch and not usable:
        needed = "NVIDIA apex with its CUDA extensions" if asked is OptimizerImpl.apex else package
        raise TrainingError(f"optimizer.impl ({asked.value}) needs a CUDA device and {needed}; use auto")
    return asked
