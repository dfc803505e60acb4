"""The step: forward, backward, one global norm, one clip, one update, or none if a number is not finite."""

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model.loss import linear_cross_entropy
from parallel.config import ParallelConfig, ParallelError, no_graphs
from parallel.counters import StepCounters
from parallel.fp8 import Fp8Linear, agree_on_scales
from parallel.graphs import Graphs
from parallel.loss_scaler import LossScaler
from parallel.mesh import Mesh
from parallel.nonfinite import Watch
from parallel.parallelize import set_gradient_sync, sharded_modules
from parallel.tensor_parallel import divided_dim, head_parts
from parallel.token_weights import token_weights
from training.config import LossConfig

if TYPE_CHECKING:
    from parallel.pipeline import Inputs, Pipeline

IGNORED = -100  # the label of a token without a target


class MicroBatch(Protocol):
    """What the engine reads of a batch; CPU tensors, see `data/batches.py`."""

    tokens_BT: Tensor
    labels_BT: Tensor
    positions_BT: Tensor
    source_BT: Tensor
    cu_seqlens: Tensor
    max_seq_len: int


class Optimizer(Protocol):
    def step(self, *, grad_scale: Tensor, finite: Tensor) -> Tensor: ...


@dataclass(slots=True)
class StepResult:
    """What a step gave. Tensors are on the device: reading one waits for the step."""

    loss: Tensor  # scalar, as the step minimised it
    grad_norm: Tensor  # scalar, over all parameters, before clipping
    finite: Tensor  # scalar; False: nothing was changed
    rates_2: Tensor  # the learning rate and beta2 of the update
    n_tokens: int  # padding and masked ones included
    n_targets: int
    totals_S4: Tensor  # float64, a row a source: sum of nll, correct, targets, bytes
    aux: dict[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Sums:
    """What is added up over micro-batches."""

    loss: Tensor
    totals_S4: Tensor


class Engine:
    """Runs steps of one model and one optimizer on a mesh, without waiting for the device.

    `model` is what this rank has of it, `stages` the same as pipeline stages, both as `parallelize` leaves them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        mesh: Mesh,
        *,
        parallel: ParallelConfig,
        loss: LossConfig,
        max_grad_norm: float,
        stages: Sequence[nn.Module] = (),
        scaler: LossScaler,
        counters: StepCounters,
        n_sources: int,
        bytes_per_token: Tensor | None = None,
    ) -> None:
        self.model = model
        self.config = parallel
        self.stages = list(stages) or [model]
        self.params = dict(model.named_parameters())  # as they are between steps: this process' shards
        copies: Any = model.tied_params
        self.counted = [param for name, param in self.params.items() if name not in copies and is_first_copy(param)]
        self.optimizer = optimizer
        self.mesh = mesh
        self.casts = [m.cast for m in model.modules() if isinstance(m, Fp8Linear) and m.cast is not None]
        self.pipeline = self._open_pipeline()
        self.linear_loss = partial(
            linear_cross_entropy,
            chunk_tokens=loss.chunk_tokens,
            label_smoothing=loss.label_smoothing,
            z_loss=loss.z_loss,
        )
        self.token_weights = partial(token_weights, reduction=loss.reduction)
        self.scaler = scaler
        self.max_grad_norm = max_grad_norm
        self.n_sources = n_sources
        self.bytes_per_token = None if bytes_per_token is None else bytes_per_token.to(mesh.device)
        self.counters = counters
        self.graphs = self._open_graphs() if self.config.cuda_graphs else None

    def _open_pipeline(self) -> "Pipeline | None":
        if self.mesh.axes.pp == 1:
            return None
        from parallel.pipeline import Pipeline

        whole: Any = self.model.config
        return Pipeline(self.stages, self.mesh, self.config, whole)

    def _open_graphs(self) -> Graphs:
        device = self.mesh.device
        if device.type != "cuda":
            raise no_graphs(str(device))
        if importlib.util.find_spec("triton") is None:  # without it the update waits for the device
            raise ParallelError("parallel.cuda_graphs (true) needs Triton: pip install triton, or choose false")
        return self.graphs_on(torch.cuda.Stream(device))

    def graphs_on(self, stream: Any) -> Graphs:
        """Give what runs whole steps, recording them on a stream if there is one."""
        sums, scalar = self._no_sums(), torch.zeros((), device=self.mesh.device)
        rates_2 = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        results = (scalar, scalar.clone(), scalar.bool(), rates_2, sums.totals_S4.clone())
        return Graphs(self.params.values(), self._pass, self._update, sums, results, stream)

    def train_step(self, batches: Sequence[MicroBatch]) -> StepResult:
        """Run the micro-batches of one step and update the weights, unless the gradient is not finite."""
        counts, weights = self._weights(batches)
        if self.graphs is None:
            sums = self._no_sums()
            self._run(batches, weights, sums)
            found = self._update(sums)
        else:
            found = self.graphs.step(batches, weights)
        loss, grad_norm, finite, rates_2, totals_S4 = found
        if self.scaler.dynamic:  # the next step's scale is a number of the host's
            self.scaler.update(finite=bool(finite))
        n_tokens = sum(batch.tokens_BT.numel() for batch in batches) * self.mesh.dp_size
        self._drop_gradients()
        return StepResult(loss, grad_norm, finite, rates_2, n_tokens, sum(counts), totals_S4)

    def _update(self, sums: Sums) -> Sequence[Tensor]:
        """Update the weights from all gradients; gives loss, norm, whether that is finite, rates_2 and totals_S4."""
        loss, grad_norm, totals_S4 = self._over_all_ranks(sums, self._grad_norm())
        loss, grad_norm = loss / self.scaler.scale, grad_norm / self.scaler.scale
        finite = torch.isfinite(grad_norm)
        # The clip and the loss scale are one division, done inside the update.
        clip = ((grad_norm + 1e-6) / self.max_grad_norm).clamp(min=1.0) if self.max_grad_norm > 0 else 1.0
        rates_2 = self.optimizer.step(grad_scale=torch.ones_like(grad_norm) * clip * self.scaler.scale, finite=finite)
        self.counters.add(finite)
        return loss, grad_norm, finite, rates_2, totals_S4

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> Tensor:
        """Score batches without training; gives totals_S4 as in `StepResult`."""
        sums = self._no_sums()
        self._agree_on_scales()
        for batch in batches:
            tokens_BT, told = self._inputs(batch, 0.0, sums)
            if self.pipeline is None:
                self.model(tokens_BT, **told)
            else:
                self.pipeline.evaluate(tokens_BT, told)
        for stage in self.stages:
            for module in sharded_modules(stage):
                module.reshard()
        return self._over_all_ranks(sums, torch.zeros_like(sums.loss))[2]

    def find_nonfinite_module(self, batches: Sequence[MicroBatch]) -> str:
        """Run a step's passes again, without an update, and name the first module whose numbers are not finite.

        Every rank must ask: the first is that of all ranks.
        """
        watch = Watch(self.model)
        try:
            for name, param in self.params.items():
                watch.note_weight(name, local(param))
            if not self.mesh.all_reduce_max(bool(watch.bad)):
                with watch:
                    self._run(batches, self._weights(batches)[1], self._no_sums())
                for name, param in reversed(self.params.items()):
                    if param.grad is not None:
                        watch.note_gradient(name, local(param.grad))
            found = [event for events in self.mesh.gather(watch.bad) for event in events]
            return min(found).text if found else "the sum of finite gradients overflowed"
        finally:
            self._drop_gradients()

    def _run(self, batches: Sequence[MicroBatch], weights: Sequence[float], sums: Sums) -> None:
        """Run forward and backward passes, and add to `sums`."""
        self._agree_on_scales()
        inputs = [self._inputs(batch, weight, sums) for batch, weight in zip(batches, weights, strict=True)]
        if self.pipeline is not None:
            self.pipeline.train(inputs)
            return
        for index, (tokens_BT, told) in enumerate(inputs, 1):
            set_gradient_sync(self.model, self.config.zero_stage, last=index == len(inputs))
            self.model(tokens_BT, **told).backward()

    def _pass(self, batch: MicroBatch, weight: Tensor, sums: Sums) -> None:
        """Run a micro-batch that is on the device."""
        tokens_BT, told = self._inputs(batch, weight, sums)
        self.model(tokens_BT, **told).backward()

    def _agree_on_scales(self) -> None:
        """Before weights are gathered in 8 bits: they may have changed."""
        if self.casts and self.mesh.param_mesh is not None:
            agree_on_scales(self.casts, self.mesh.param_mesh.get_group("dp_shard"))

    def _inputs(self, batch: MicroBatch, weight: float | Tensor, sums: Sums) -> "Inputs":
        """Bring a micro-batch to the device; its head gives the weighted loss and adds to `sums`."""
        device = self.mesh.device
        labels_N = self._slice(batch.labels_BT).to(device, non_blocking=True).flatten()
        source_N = self._slice(batch.source_BT).to(device, non_blocking=True).flatten()
        weights_N = torch.where(labels_N == IGNORED, 0.0, weight).float()

        def head(h_BTD: Tensor, weight_VD: Tensor) -> Tensor:
            h_BTD, weight_VD, shard = head_parts(h_BTD, weight_VD)
            loss, nll_N, correct_N = self.linear_loss(h_BTD.flatten(0, 1), weight_VD, labels_N, weights_N, shard=shard)
            sums.loss += loss.detach()
            self._add_totals(sums.totals_S4, labels_N, source_N, nll_N, correct_N)
            return loss

        return self._slice(batch.tokens_BT).to(device, non_blocking=True), {
            "positions_BT": self._slice(batch.positions_BT).to(device, non_blocking=True),
            "cu_seqlens": batch.cu_seqlens.to(device, non_blocking=True),
            "max_seq_len": batch.max_seq_len,
            "row_len": batch.tokens_BT.shape[1],
            "head": head,
        }

    def _slice(self, x_BT: Tensor) -> Tensor:
        """Give this rank's tokens of each row."""
        size = x_BT.shape[1] // self.mesh.axes.cp
        return x_BT.narrow(1, size * self.mesh.coordinate("cp"), size)

    def _add_totals(
        self, totals_S4: Tensor, labels_N: Tensor, source_N: Tensor, nll_N: Tensor, correct_N: Tensor
    ) -> None:
        target_N = labels_N != IGNORED
        if self.bytes_per_token is None:
            bytes_N = torch.zeros_like(nll_N)
        else:
            bytes_N = self.bytes_per_token[labels_N.clamp(min=0)] * target_N
        rows_N4 = torch.stack([nll_N.double(), correct_N.double(), target_N.double(), bytes_N.double()], dim=1)
        totals_S4.index_add_(0, source_N, rows_N4)

    def _weights(self, batches: Sequence[MicroBatch]) -> tuple[list[int], list[float]]:
        """Give the target counts of all micro-batches of a step, and a target token's weight in each of this rank's."""
        counts = self.mesh.all_counts([int((batch.labels_BT != IGNORED).sum()) for batch in batches])
        weights = self.token_weights(counts)[self.mesh.dp_rank :: self.mesh.dp_size]
        return counts, [weight * self.scaler.scale for weight in weights]

    def _over_all_ranks(self, sums: Sums, grad_norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add up what each rank has of a step's loss, of the square of its norm and of its totals."""
        loss, totals_S4 = sums.loss, sums.totals_S4
        if self.mesh.world_size == 1:
            return loss, grad_norm, totals_S4
        figures = torch.cat([loss.double()[None], totals_S4.flatten(), grad_norm.double()[None].square()])
        if self.mesh.coordinate("tp"):  # peers have the same loss, but gradients of their own
            figures[:-1] = 0
        self.mesh.sum_(figures)
        return figures[0].float(), figures[-1].sqrt().float(), figures[1:-1].view_as(totals_S4)

    def _no_sums(self) -> Sums:
        device = self.mesh.device
        return Sums(torch.zeros((), device=device), torch.zeros(self.n_sources, 4, dtype=torch.float64, device=device))

    def _complete_gradients(self) -> None:
        """Give every parameter a gradient that is laid out as it is, and the copies of one the same."""
        for param in self.params.values():
            if param.grad is None:  # a step without a single target
                param.grad = torch.zeros_like(param)
            elif isinstance(param, DTensor) and isinstance(param.grad, DTensor):
                # Under sequence parallelism each rank has what its own tokens do to a norm. FSDP adds it up itself.
                param.grad = param.grad.redistribute(placements=param.placements)
        if self.pipeline is not None and self.pipeline.tied:
            self.pipeline.add_up_tied({name: local(param.grad) for name, param in self.params.items()})

    def _grad_norm(self) -> Tensor:
        """The 2-norm over the gradients of this rank's shards, with the loss scale; each parameter is counted once."""
        self._complete_gradients()
        norms = [torch.linalg.vector_norm(local(p.grad), dtype=torch.float32) for p in self.counted]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=self.mesh.device)

    def _drop_gradients(self) -> None:
        for param in self.params.values():
            param.grad = None


def is_first_copy(param: Tensor) -> bool:
    """Say whether this process' part of a parameter is, of all that hold the same, the one that is counted."""
    if not isinstance(param, DTensor):
        return True
    mesh = param.device_mesh
    whole_on = [axis for axis, placement in enumerate(param.placements) if divided_dim(placement) is None]
    return all(mesh.get_local_rank(axis) == 0 for axis in whole_on)


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
