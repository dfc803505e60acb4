"""AdamW on fp32 master weights, whatever the dtype the model computes in."""

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from training.config import Decay, Dtype, OptimizerConfig, OptimizerImpl, TrainingError

# Parameters updated by one call of a library: enough for a full launch, little enough that their fp32
# gradients are a small part of memory.
CHUNK_NUMEL = 1 << 27


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) that keeps what the model's dtype would lose.

    The masters are fp32. A parameter that is fp32 is its own master; one in bf16 is the upper half of its
    master, whose lower half is kept beside it, so that the master is exact and costs four bytes with the
    parameter; one in fp16 has a master of its own. Weight decay is decoupled. Nothing here waits for the
    device unless `impl` is a library that needs its rates on the host. `copies` are parameters that always equal
    another one, by name: they are updated like it, and kept under its name.
    """

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, *, tied_params: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.config, self.tied_params = config, tied_params
        self.params = dict(model.named_parameters())
        self.locals: dict[str, Tensor] = {name: local(param.detach()) for name, param in self.params.items()}
        self.device = next(iter(self.locals.values())).device
        self.impl = resolve_impl(config.impl, self.device)
        state_dtype = torch.bfloat16 if config.state_dtype is Dtype.bf16 else torch.float32
        self.master_remainder: dict[
            str, Tensor
        ] = {}  # of a bf16 parameter's master the lower half, of an fp16 one's all
        for name, param in self.locals.items():
            if param.dtype == torch.bfloat16:
                self.master_remainder[name] = torch.zeros_like(param, dtype=torch.int16)
            elif param.dtype != torch.float32:
                self.master_remainder[name] = param.float()
        self.exp_avg = {name: torch.zeros_like(param, dtype=state_dtype) for name, param in self.locals.items()}
        self.exp_avg_sq = {name: torch.zeros_like(param, dtype=state_dtype) for name, param in self.locals.items()}
        self.updates = torch.zeros((), device=self.device)  # made so far, for the bias correction
        self.row = torch.zeros(1, dtype=torch.int64, device=self.device)  # of the schedule, for the next update
        self.schedule_U4 = torch.zeros(0, 4, dtype=torch.float64, device=self.device)

    def decayed(self, name: str) -> bool:
        """Say whether weight decay applies to a parameter."""
        return self.config.decay is Decay.all or self.params[name].ndim >= 2

    def set_schedule(self, rates: Sequence[tuple[float, float]]) -> None:
        """Take the learning rate and beta2 of all updates to come, which a step then finds without the host."""
        first = int(self.updates) + 1
        beta1 = self.config.beta1
        rows = [
            (lr, beta2, lr / (1 - beta1**step), math.sqrt(1 - beta2**step))
            for step, (lr, beta2) in enumerate(rates, first)
        ]
        self.schedule_U4 = torch.tensor(rows, dtype=torch.float64).to(self.device)
        self.row.zero_()

    @torch.no_grad()
    def step(self, *, grad_scale: Tensor, finite: Tensor) -> Tensor:
        """Update from the parameters' gradients divided by `grad_scale`, if `finite`, and drop the gradients.

        Both are scalars on the device, as are the learning rate and beta2 that are given back.
        """
        # index_select, because indexing by a tensor of one number would read it on the host.
        rates = self.schedule_U4.index_select(0, self.row)[0]
        if self.impl is OptimizerImpl.triton:
            self._step_in_one_pass(rates, grad_scale, finite)
        elif bool(finite):
            lr, beta2 = rates[:2].tolist()
            self._step_by_library(lr, beta2, grad_scale)
        for param in self.params.values():
            param.grad = None
        self.updates += finite
        self.row += finite
        return rates[:2]

    def _step_in_one_pass(self, rates: Tensor, grad_scale: Tensor, finite: Tensor) -> None:
        from training.optim.adamw_kernel import update

        lr, beta2, step_size, bias_correction2_sqrt = rates.unbind()
        scalars = {}
        for weight_decay in {self.config.weight_decay, 0.0}:
            # fp64 until here, as torch.optim.AdamW has its scalars
            row = (1 - lr * weight_decay, beta2, 1 - beta2, -step_size, 1 / bias_correction2_sqrt)
            scalars[weight_decay] = torch.stack([grad_scale.double(), finite.double(), *row]).float()
        for name, param in self.locals.items():
            weight_decay = self.config.weight_decay if self.decayed(name) else 0.0
            update(
                param,
                self.master_remainder.get(name),
                _gradient(self.params[name]),
                self.exp_avg[name],
                self.exp_avg_sq[name],
                scalars[weight_decay],
                beta1=self.config.beta1,
                eps=self.config.eps,
            )

    def _step_by_library(self, lr: float, beta2: float, grad_scale: Tensor) -> None:
        for names, weight_decay in self._chunks():
            masters = [self._master(name) for name in names]
            exp_avgs = [self.exp_avg[name].float() for name in names]
            exp_avg_sqs = [self.exp_avg_sq[name].float() for name in names]
            grads = [_gradient(self.params[name]).float() for name in names]
            settings: dict[str, Any] = {"lr": lr, "beta2": beta2, "weight_decay": weight_decay}
            if self.impl is OptimizerImpl.apex:
                self._apex(masters, grads, exp_avgs, exp_avg_sqs, grad_scale, **settings)
            else:
                adamw(
                    masters,
                    grads,
                    exp_avgs,
                    exp_avg_sqs,
                    [],
                    [self.updates.clone() for _ in names],
                    fused=True,
                    grad_scale=grad_scale,
                    amsgrad=False,
                    beta1=self.config.beta1,
                    eps=self.config.eps,
                    maximize=False,
                    **settings,
                )
            for name, master, exp_avg, exp_avg_sq in zip(names, masters, exp_avgs, exp_avg_sqs, strict=True):
                self._set_master(name, master)
                self.exp_avg[name].copy_(exp_avg)
                self.exp_avg_sq[name].copy_(exp_avg_sq)

    def _apex(
        self,
        masters: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        grad_scale: Tensor,
        *,
        lr: float,
        beta2: float,
        weight_decay: float,
    ) -> None:
        import amp_C  # type: ignore[import-not-found]
        from apex.multi_tensor_apply import multi_tensor_applier  # type: ignore[import-not-found]

        overflow = torch.zeros(1, dtype=torch.int32, device=self.device)
        scaled = [grad / grad_scale for grad in grads]
        step, decoupled, bias_correction = int(self.updates) + 1, 1, 1
        multi_tensor_applier(
            amp_C.multi_tensor_adam, overflow, [scaled, masters, exp_avgs, exp_avg_sqs],
            lr, self.config.beta1, beta2, self.config.eps, step, decoupled, bias_correction, weight_decay,
        )  # fmt: skip

    def _chunks(self) -> Iterator[tuple[list[str], float]]:
        """Names that share a decay, in groups of about `CHUNK_NUMEL` numbers."""
        for decayed in (True, False):
            weight_decay = self.config.weight_decay if decayed else 0.0
            names: list[str] = []
            numel = 0
            for name, param in self.locals.items():
                if self.decayed(name) != decayed:
                    continue
                if names and numel + param.numel() > CHUNK_NUMEL:
                    yield names, weight_decay
                    names, numel = [], 0
                names.append(name)
                numel += param.numel()
            if names:
                yield names, weight_decay

    def _master(self, name: str) -> Tensor:
        """Give a parameter's master: itself, what is kept of it, or its halves joined."""
        param, rest = self.locals[name], self.master_remainder.get(name)
        if rest is None or rest.dtype == torch.float32:
            return param if rest is None else rest
        return join(param, rest)

    def _set_master(self, name: str, master: Tensor) -> None:
        param, rest = self.locals[name], self.master_remainder.get(name)
        if rest is None:
            param.copy_(master)
        elif rest.dtype == torch.float32:
            rest.copy_(master)
            param.copy_(master)
        else:
            upper, lower = split(master)
            param.copy_(upper)
            rest.copy_(lower)

    @torch.no_grad()
    def state_tensors(self) -> dict[str, Tensor]:
        """Everything to keep, by checkpoint name, in fp32: master weights, moments and the count of updates.

        What the device does not hold in fp32 is put together on the CPU; `load_tensors` is the inverse.
        """
        kept = {}
        for name, param in self.params.items():
            rest = self.master_remainder.get(name)
            if rest is not None and rest.dtype == torch.int16:
                master = join(self.locals[name].cpu(), rest.cpu())
            else:
                master = self._master(name)
            kept_as = self.tied_params.get(name, name)
            kept[f"model.{kept_as}"] = like(param, master)
            for moment in ("exp_avg", "exp_avg_sq"):
                tensor = getattr(self, moment)[name]
                tensor = tensor if tensor.dtype == torch.float32 else tensor.cpu().float()
                kept[f"optimizer.{kept_as}.{moment}"] = like(param, tensor)
            kept[f"optimizer.{kept_as}.step"] = self.updates
        return kept

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over `tensors`, which `state_tensors()` gave and which were then loaded into."""
        for name in self.params:
            kept_as = self.tied_params.get(name, name)
            self._set_master(name, local(tensors[f"model.{kept_as}"]).to(self.device))
            for moment in ("exp_avg", "exp_avg_sq"):
                getattr(self, moment)[name].copy_(local(tensors[f"optimizer.{kept_as}.{moment}"]))


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Divide fp32 into the nearest bf16 (of two the one further from 0) and the bits it is off by, int16."""
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    lower = bits - (upper << 16)
    return upper.to(torch.int16).view(torch.bfloat16), lower.to(torch.int16)


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """Give back the fp32 number that `split` divided."""
    return ((upper.view(torch.int16).int() << 16) + lower).view(torch.float32)


def resolve_impl(asked: OptimizerImpl, device: torch.device) -> OptimizerImpl:
    """Choose what makes the update; raises `TrainingError` if what was asked for is not here."""
    if asked is OptimizerImpl.auto:
        fast = device.type == "cuda" and importlib.util.find_spec("triton") is not None
        return OptimizerImpl.triton if fast else OptimizerImpl.torch
    if asked in (OptimizerImpl.triton, OptimizerImpl.apex) and device.type != "cuda":
        raise TrainingError(f"optimizer.impl ({asked.value}) needs a CUDA device; use optimizer.impl=auto on {device}")
    if asked is OptimizerImpl.triton and importlib.util.find_spec("triton") is None:
        raise TrainingError("optimizer.impl (triton) is not installed: pip install triton, or use optimizer.impl=torch")
    if asked is OptimizerImpl.apex and importlib.util.find_spec("amp_C") is None:
        raise TrainingError(
            "optimizer.impl (apex) needs NVIDIA apex built with its CUDA extensions from "
            "https://github.com/NVIDIA/apex; the `apex` that pip installs is another package; "
            "optimizer.impl=auto needs neither"
        )
    return asked


def local(tensor: Tensor) -> Tensor:
    """Give this process' part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def like(param: Tensor, part: Tensor) -> Tensor:
    """Give `part` the layout of a parameter that is distributed; it may be on another device."""
    if not hasattr(param, "to_local"):
        return part
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    spec: Any = param._spec  # type: ignore[attr-defined]
    meta = TensorMeta(spec.tensor_meta.shape, spec.tensor_meta.stride, part.dtype)
    return DTensor(part, DTensorSpec(spec.mesh, spec.placements, tensor_meta=meta), requires_grad=False)


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None, "an update needs every gradient"
    return local(param.grad)
