"""Muon: momentum, orthogonalised (Jordan et al. 2024), for the matrices of the blocks; AdamW updates the rest."""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.shards import ParamShard
from parallel.whole_matrices import WholeMatrices, group_of
from training.config import MuonScale, OptimizerConfig, OptimizerImpl
from training.optim.adamw import resolve_impl
from training.optim.master_weights import MasterWeights, read, write
from training.optim.optimizer import CHUNK_NUMEL, Group, State, UpdateRule, gradient

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
# Five steps of Polar Express (arXiv:2505.16932), for matrices whose norm is at most 1 / 1.02.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
EPS = 1e-7
KERNEL_ELEMENTS = 12_000_000  # of products from which on the kernel for symmetric ones is faster than torch


class Muon(UpdateRule):
    """As torch.optim.Muon computes it, on exact fp32 masters and in any layout.

    Each matrix is orthogonalised by one rank. `optimizer.normuon` divides its rows by their running root mean square
    and restores the norm (arXiv:2510.05491); `optimizer.cautious_decay` decays only what the update shrinks
    (arXiv:2510.12402).
    """

    on_device = True
    size_free = True

    def __init__(self, config: OptimizerConfig, params: Mapping[str, ParamShard]) -> None:
        super().__init__(config, params)
        device = next(iter(params.values())).shard.device
        # of the iteration and of what ranks exchange; few CPUs are fast in bf16
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        # On GPUs each is one kernel.
        compiles = resolve_impl(config.impl, device) is OptimizerImpl.triton
        self.add_gradient: Callable[..., Tensor] = torch.compile(add_gradient) if compiles else add_gradient
        self.apply_update: Callable[..., None] = torch.compile(apply_update) if compiles else apply_update
        self.batches: dict[tuple[str, ...], list[tuple[list[str], WholeMatrices]]] = {}  # by the names of a group
        meshes = dict.fromkeys(param.mesh for param in params.values() if param.mesh is not None)
        self.groups: dict[object, dist.ProcessGroup | None] = {mesh: group_of(mesh) for mesh in meshes}

    @classmethod
    def takes(cls, name: str, param: ParamShard) -> bool:
        return param.ndim == 2 and "blocks." in name

    def new_state(self, shard: Tensor) -> dict[str, Tensor]:
        state = {"momentum": torch.zeros_like(shard)}
        return state | ({"row_square": shard.new_zeros(len(shard), 1)} if self.config.normuon else {})

    def flops(self) -> int:
        groups = list(self.batches) or [tuple(self.params)]
        return sum(matrices.largest_cost for group in groups for _, matrices in self._batches(list(group)))

    def update_raw(
        self, weights: MasterWeights, state: State, names: list[str], group: Group, rates: Tensor,
        grad_scale: Tensor, finite: Tensor,
    ) -> None:  # fmt: skip
        lr = rates[0] * finite  # a step that is not finite changes nothing
        lerp_weight = ((1 - self.config.momentum) * finite).float()
        momentum = state["momentum"]
        for batch, matrices in self._batches(names):
            updates = [
                self.add_gradient(
                    momentum[name], gradient(weights.params[name]), grad_scale, finite, lerp_weight,
                    self.config.momentum, self.dtype,
                )
                for name in batch
            ]  # fmt: skip
            wholes = orthogonalize(matrices.gather(updates), polar_express=self.config.polar_express)
            if self.config.normuon:
                row_weight = ((1 - rates[1]) * finite).float()
                wholes = self._normalize_rows(matrices, wholes, [state["row_square"][n] for n in batch], row_weight)
            for name, update in zip(batch, matrices.scatter(wholes, updates), strict=True):
                scale = scale_of(weights.params[name].shape, self.config.scale)
                self.apply_update(
                    weights.shards[name], weights.remainder.get(name), update, lr * scale, lr * group.weight_decay,
                    self.config.cautious_decay,
                )  # fmt: skip

    def _normalize_rows(
        self, matrices: WholeMatrices, wholes: list[Tensor], squares: list[Tensor], weight: Tensor
    ) -> list[Tensor]:
        averages, normalized = matrices.gather([square.float() for square in squares], per_row=True), []
        for number, whole in enumerate(wholes):
            rows = whole.float()
            averages[number] = averages[number].lerp(rows.square().mean(dim=1, keepdim=True), weight)
            scaled = rows / (averages[number].sqrt() + EPS)
            normalized.append((scaled * (rows.norm() / scaled.norm().clamp(min=EPS))).to(whole.dtype))
        for square, average in zip(squares, matrices.scatter(averages, squares, per_row=True), strict=True):
            square.copy_(average)
        return normalized

    def _batches(self, names: list[str]) -> list[tuple[list[str], WholeMatrices]]:
        """Return matrices in batches that take little memory of each rank."""
        if tuple(names) in self.batches:
            return self.batches[tuple(names)]
        batches: dict[tuple[int, object], list[str]] = {}
        found, total = list[tuple[list[str], WholeMatrices]](), 0.0
        for name in names:
            param = self.params[name]
            total += param.numel() / (1 if param.mesh is None else param.mesh.size())
            batches.setdefault((int(total // CHUNK_NUMEL), param.mesh), []).append(name)
        for (_, mesh), batch in batches.items():
            params = [self.params[name] for name in batch]
            costs = [n_flops(param.shape) for param in params]
            found.append((batch, WholeMatrices(params, costs, self.groups.get(mesh))))
        self.batches[tuple(names)] = found
        return found


def add_gradient(
    momentum: Tensor, grad: Tensor, grad_scale: Tensor, finite: Tensor, lerp_weight: Tensor, nesterov: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Add a gradient to its momentum; return the matrix to orthogonalise."""
    grad = torch.where(finite.bool(), grad.float() / grad_scale, 0.0)
    average = momentum.float().lerp(grad, lerp_weight)
    momentum.copy_(average)
    return grad.lerp(average, nesterov).to(dtype)


def apply_update(
    param: Tensor, remainder: Tensor | None, update: Tensor, rate: Tensor, decay: Tensor, cautious: bool
) -> None:
    master, update = read(param, remainder), update.float()
    decayed = master * (master * update > 0) if cautious else master
    write(param, remainder, master - decayed * decay - update * rate)


def orthogonalize(matrices: Sequence[Tensor], *, polar_express: bool = False) -> list[Tensor]:
    """Return the nearest matrices whose singular values are all about 1; those of one shape are computed together."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for number, matrix in enumerate(matrices):
        by_shape.setdefault(tuple(matrix.shape), []).append(number)
    found: dict[int, Tensor] = {}
    for (rows, columns), numbers in by_shape.items():
        x = torch.stack([matrices[number] for number in numbers])
        x = x.mT if rows > columns else x
        x = x / (x.norm(dim=(1, 2), keepdim=True) * (1.02 if polar_express else 1.0)).clamp(min=EPS)
        for a, b, c in POLAR_EXPRESS if polar_express else NEWTON_SCHULZ:
            x = torch.baddbmm(x, _polynomial(x, b, c), x, beta=a)
        found.update(zip(numbers, x.mT if rows > columns else x, strict=True))
    return [found[number] for number in range(len(matrices))]


def _polynomial(x: Tensor, b: float, c: float) -> Tensor:
    """Return b A + c A^2 for A = x x^T."""
    if takes_kernel(x):
        from training.optim.symmetric_kernel import product

        return product(product(x), beta=b, alpha=c)
    square = x @ x.mT
    return torch.baddbmm(square, square, square, beta=b, alpha=c)


def takes_kernel(x: Tensor) -> bool:
    """Return whether symmetric products are computed by half: if they are large, in bf16, on Hopper or Blackwell."""
    if not x.is_cuda or x.dtype is not torch.bfloat16 or x.shape[0] * x.shape[1] ** 2 < KERNEL_ELEMENTS:
        return False
    return torch.cuda.get_device_capability(x.device)[0] in (9, 10) and bool(importlib.util.find_spec("triton"))


def n_flops(shape: Sequence[int]) -> int:
    """Return the FLOPs of `orthogonalize` for one matrix."""
    short, long = sorted(shape)
    return len(NEWTON_SCHULZ) * (4 * short**2 * long + 2 * short**3)


def scale_of(shape: Sequence[int], scale: MuonScale) -> float:
    """Return the factor on the rate for a matrix (out, in), whose update has singular values of 1."""
    rows, columns = shape
    return {
        MuonScale.match_rms_adamw: 0.2 * math.sqrt(max(rows, columns)),  # arXiv:2502.16982
        MuonScale.spectral: math.sqrt(rows / columns),  # arXiv:2310.17813
        MuonScale.original: math.sqrt(max(1, rows / columns)),
    }[scale]
