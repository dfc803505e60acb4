"""The training step: forward, backward, one global norm, one clip, one update, or none if the norm is not finite."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from data.batches import IGNORED, Batch
from model.aux_loss import AuxLosses
from model.loss import linear_cross_entropy
from model.transformer import Transformer
from parallel.config import ParallelConfig, no_graphs
from parallel.counters import StepCounters
from parallel.fp8 import Fp8Linear, reduce_scales
from parallel.graphs import Graphs
from parallel.loss_scaler import LossScaler
from parallel.mesh import Mesh
from parallel.nonfinite import NonfiniteWatch
from parallel.parallelize import set_gradient_sync, sharded_modules
from parallel.tensor_parallel import local, local_head, sharded_dim
from training.config import LossConfig, Reduction

if TYPE_CHECKING:
    from parallel.pipeline import Inputs

Head = Callable[[Tensor, Tensor], Tensor]  # of the last hidden states h_BTD and the head's weight_VD


class Optimizer(Protocol):
    def step(self, *, grad_scale: Tensor, finite: Tensor) -> Tensor:
        """Update from gradients divided by `grad_scale`, if `finite`; return learning rate and beta2."""
        ...


@dataclass(slots=True)
class StepResult:
    """The figures of a step over all ranks. Tensors are on the device: reading one waits for the step."""

    loss: Tensor  # scalar: the weighted sum of the tokens' losses
    grad_norm: Tensor  # scalar, over all parameters, before clipping
    finite: Tensor  # scalar; False: the step changed nothing
    rates_2: Tensor  # learning rate and beta2 of the update
    totals_S4: Tensor  # float64, per source: sum of nll, correct, targets, bytes
    aux: dict[str, Tensor]  # auxiliary losses by name: summed over layers, mean over micro-batches
    n_tokens: int  # including padding and masked ones
    n_targets: int


@dataclass(slots=True)
class Sums:
    """What this rank sums over the micro-batches of a step, auxiliary losses by name."""

    loss: Tensor
    totals_S4: Tensor
    aux_weight: Tensor  # scalar: of each auxiliary loss in the backward pass
    aux: dict[str, Tensor] = field(default_factory=dict)

    def zero_(self) -> None:
        for tensor in (self.loss, self.totals_S4, *self.aux.values()):
            tensor.zero_()


class Engine:
    """Runs steps of a model and an optimizer on a mesh, without waiting for the device.

    `model` holds this rank's parameters, `stages` are its pipeline stages, both as `parallelize` leaves them.
    `bytes_per_token` (V,) is the length of each token's text, if known; `n_sources` is S.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: Optimizer,
        mesh: Mesh,
        *,
        parallel: ParallelConfig,
        loss: LossConfig,
        max_grad_norm: float,
        stages: Sequence[Transformer] = (),
        scaler: LossScaler,
        counters: StepCounters,
        n_sources: int,
        bytes_per_token: Tensor | None = None,
    ) -> None:
        self.model, self.optimizer, self.mesh, self.config = model, optimizer, mesh, parallel
        self.stages = list(stages) or [model]
        self.scaler, self.counters, self.max_grad_norm = scaler, counters, max_grad_norm
        self.params = dict(model.named_parameters())  # between steps: this rank's shards
        self.counted = [p for name, p in self.params.items() if name not in model.tied_params and is_first_copy(p)]
        self.casts = [m.cast for m in model.modules() if isinstance(m, Fp8Linear) and m.cast is not None]
        self.reduction, self.n_sources = loss.reduction, n_sources
        smoothing, z_loss = loss.label_smoothing, loss.z_loss
        self.linear_loss: Callable[..., tuple[Tensor, Tensor, Tensor]] = partial(
            linear_cross_entropy, chunk_tokens=loss.chunk_tokens, label_smoothing=smoothing, z_loss=z_loss
        )
        self.bytes_per_token = None if bytes_per_token is None else bytes_per_token.to(mesh.device)
        self.aux_names: list[str] | None = None  # of all ranks; known after the first step's passes
        self.pipeline = None
        if mesh.axes.pp > 1:
            from parallel.pipeline import Pipeline

            self.pipeline = Pipeline(self.stages, mesh, parallel, model.config)
        if parallel.cuda_graphs and mesh.device.type != "cuda":
            raise no_graphs(str(mesh.device))
        self.graphs = self.graphs_on(torch.cuda.Stream(mesh.device)) if parallel.cuda_graphs else None

    def graphs_on(self, stream: torch.cuda.Stream | None) -> Graphs:
        return Graphs(self.params.values(), self._run_one, self._update, self._no_sums(), stream)

    def train_step(self, batches: Sequence[Batch]) -> StepResult:
        """Run the micro-batches of a step and update the weights, unless the gradient is not finite."""
        counts, weights, aux_weight = self._weights(batches)
        if self.graphs is None:
            sums = self._no_sums(aux_weight)
            self._run(batches, weights, sums)
            figures = self._update(sums)
        else:
            figures = self.graphs.step(batches, weights, aux_weight)
        loss, grad_norm, finite, rates_2, totals_S4, *sums_of_aux = figures
        share = aux_weight / self.scaler.scale
        aux = {name: total * share for name, total in zip(self.aux_names or (), sums_of_aux, strict=True)}
        if self.scaler.dynamic:  # the next step's scale is computed on the host
            self.scaler.update(finite=bool(finite))
        self._drop_gradients()
        n_tokens = sum(batch.tokens_BT.numel() for batch in batches) * self.mesh.dp_size
        return StepResult(loss, grad_norm, finite, rates_2, totals_S4, aux, n_tokens, sum(counts))

    def _update(self, sums: Sums) -> Sequence[Tensor]:
        """Update the weights; returns loss, norm, whether it is finite, rates_2, totals_S4 and auxiliary losses."""
        loss, grad_norm, totals_S4, *aux = self._reduce(sums, self._grad_norm())
        loss, grad_norm = loss / self.scaler.scale, grad_norm / self.scaler.scale
        finite = torch.isfinite(grad_norm)
        # The clip and the loss scale are one division, done inside the update.
        clip = ((grad_norm + 1e-6) / self.max_grad_norm).clamp(min=1.0) if self.max_grad_norm > 0 else 1.0
        rates_2 = self.optimizer.step(grad_scale=torch.ones_like(grad_norm) * clip * self.scaler.scale, finite=finite)
        self.counters.add(finite)
        return loss, grad_norm, finite, rates_2, totals_S4, *aux

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], n_sources: int | None = None, head: Head | None = None) -> Tensor:
        """Score batches without training; returns totals_S4 as in `StepResult`.

        `n_sources` is another S than training's; `head` is called on the last hidden states in place of the loss.
        """
        sums = self._no_sums(n_sources=n_sources)
        self._reduce_scales()
        try:
            for batch in batches:
                tokens_BT, kwargs = self._inputs(batch, 0.0, sums)
                kwargs["head"] = head or kwargs["head"]
                if self.pipeline is None:
                    self.model(tokens_BT, **kwargs)
                else:
                    self.pipeline.evaluate(tokens_BT, kwargs)
        finally:  # a training step must not find gathered weights that are out of date
            for stage in self.stages:
                for module in sharded_modules(stage):
                    module.reshard()
        return self.mesh.sum_(sums.totals_S4 * (self.mesh.coordinate("tp") == 0))

    def find_nonfinite_module(self, batches: Sequence[Batch]) -> str:
        """Rerun a step's passes without an update, and name the first non-finite module of all ranks; a collective."""
        watch = NonfiniteWatch(self.model)
        try:
            watch.check_params(self.params)
            if not self.mesh.all_reduce_max(bool(watch.events)):
                _, weights, aux_weight = self._weights(batches)
                with watch:
                    self._run(batches, weights, self._no_sums(aux_weight))
                watch.check_params(self.params)
            events = [event for events in self.mesh.gather(watch.events) for event in events]
            return min(events).text if events else "the sum of finite gradients overflowed"
        finally:
            self._drop_gradients()

    def _run(self, batches: Sequence[Batch], weights: Sequence[float], sums: Sums) -> None:
        """Run forward and backward passes, and add to `sums`."""
        self._reduce_scales()
        if self.pipeline is None:
            for index, (batch, weight) in enumerate(zip(batches, weights, strict=True), 1):
                set_gradient_sync(self.model, self.config.zero_stage, last=index == len(batches))
                self._run_one(batch, weight, sums)
            return
        inputs = [self._inputs(*pair, sums) for pair in zip(batches, weights, strict=True)]
        self.pipeline.train(inputs)
        for _, kwargs in inputs:
            self._add_aux(kwargs["aux"], sums)

    def _run_one(self, batch: Batch, weight: float | Tensor, sums: Sums) -> None:
        tokens_BT, kwargs = self._inputs(batch, weight, sums)
        self.model(tokens_BT, **kwargs).backward()
        self._add_aux(kwargs["aux"], sums)

    def _add_aux(self, aux: AuxLosses, sums: Sums) -> None:
        for name, loss in aux.sums.items():
            sums.aux[name] = sums.aux.get(name, torch.zeros((), device=self.mesh.device))
            sums.aux[name] += loss  # in place, as graphs need it

    def _reduce_scales(self) -> None:
        if self.casts and self.mesh.param_mesh is not None:
            reduce_scales(self.casts, self.mesh.param_mesh.get_group("dp_shard"))

    def _inputs(self, batch: Batch, weight: float | Tensor, sums: Sums) -> "Inputs":
        """Return this rank's tokens on the device; the head returns the weighted loss and adds to `sums`."""
        device, row_len = self.mesh.device, batch.tokens_BT.shape[1]
        length = row_len // self.mesh.axes.cp
        tokens_BT, labels_BT, positions_BT, source_BT = (
            x_BT.narrow(1, length * self.mesh.coordinate("cp"), length).to(device, non_blocking=True)
            for x_BT in (batch.tokens_BT, batch.labels_BT, batch.positions_BT, batch.source_BT)
        )
        labels_N = labels_BT.flatten()
        weights_N = torch.where(labels_N == IGNORED, 0.0, weight).float()

        def head(h_BTD: Tensor, weight_VD: Tensor) -> Tensor:
            h_BTD, weight_VD, shard = local_head(h_BTD, weight_VD)
            loss, nll_N, correct_N = self.linear_loss(h_BTD.flatten(0, 1), weight_VD, labels_N, weights_N, shard=shard)
            sums.loss += loss.detach()
            target_N, lengths = labels_N != IGNORED, self.bytes_per_token
            bytes_N = torch.zeros_like(nll_N) if lengths is None else lengths[labels_N.clamp(min=0)] * target_N
            totals_N4 = torch.stack([x_N.double() for x_N in (nll_N, correct_N, target_N, bytes_N)], dim=1)
            sums.totals_S4.index_add_(0, source_BT.flatten(), totals_N4)
            return loss

        return tokens_BT, {
            "positions_BT": positions_BT,
            "cu_seqlens": batch.cu_seqlens.to(device, non_blocking=True),
            "max_seq_len": batch.max_seq_len,
            "row_len": row_len,
            "head": head,
            "aux": AuxLosses(sums.aux_weight),
        }

    def _weights(self, batches: Sequence[Batch]) -> tuple[list[int], list[float], float]:
        """Return all ranks' target counts, this rank's weights of target tokens, and the weight of auxiliary losses.

        An auxiliary loss is a mean over micro-batches and over cp ranks, each of which has it for its own tokens.
        """
        counts = self.mesh.all_counts([int((batch.labels_BT != IGNORED).sum()) for batch in batches])
        weights = token_weights(counts, self.reduction)[self.mesh.dp_rank :: self.mesh.dp_size]
        scale = self.scaler.scale
        return counts, [weight * scale for weight in weights], scale / (len(counts) * self.mesh.axes.cp)

    def _reduce(self, sums: Sums, grad_norm: Tensor) -> Sequence[Tensor]:
        """Return loss, gradient norm, totals_S4 and auxiliary losses of all ranks, from those of each."""
        if self.aux_names is None:  # they may differ between pipeline stages
            names = set(sums.aux)
            if self.mesh.axes.pp > 1 and self.mesh.all_reduce_max(bool(names)):
                names = names.union(*self.mesh.gather(names))
            self.aux_names = sorted(names)
        aux = [sums.aux[name] if name in sums.aux else torch.zeros_like(grad_norm) for name in self.aux_names]
        if self.mesh.world_size == 1:
            return sums.loss, grad_norm, sums.totals_S4, *aux
        scalars = [x.double()[None] for x in (sums.loss, *aux, grad_norm.square())]
        figures = torch.cat([sums.totals_S4.flatten(), *scalars])
        if self.mesh.coordinate("tp"):  # tp ranks have the same losses, but their own parts of the gradient
            figures[:-1] = 0
        self.mesh.sum_(figures)
        totals, (loss, *aux, square) = figures[: -len(scalars)], figures[-len(scalars) :].unbind()
        return loss.float(), square.sqrt().float(), totals.view_as(sums.totals_S4), *aux

    def _no_sums(self, aux_weight: float = 0.0, n_sources: int | None = None) -> Sums:
        zero = torch.zeros((), device=self.mesh.device)
        totals_S4 = zero.new_zeros(n_sources or self.n_sources, 4, dtype=torch.float64)
        return Sums(zero, totals_S4, torch.full_like(zero, aux_weight))

    def _grad_norm(self) -> Tensor:
        """Return the 2-norm over this rank's gradients, times the loss scale; each parameter is counted once.

        Every parameter gets a gradient with its own layout, and tied parameters the sum of theirs.
        """
        for param in self.params.values():
            if param.grad is None:  # a step without a single target
                param.grad = torch.zeros_like(param)
            elif isinstance(param, DTensor) and isinstance(param.grad, DTensor):
                # Under sequence parallelism a norm's gradient is a partial sum over this rank's tokens; FSDP sums it.
                param.grad = param.grad.redistribute(placements=param.placements)
        if self.pipeline is not None and self.pipeline.tied:
            self.pipeline.sum_tied(self.params)
        grads = [param.grad for param in self.counted if param.grad is not None]
        norms = [torch.linalg.vector_norm(local(grad), dtype=torch.float32) for grad in grads]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=self.mesh.device)

    def _drop_gradients(self) -> None:
        for param in self.params.values():
            param.grad = None


def is_first_copy(param: Tensor) -> bool:
    """Return whether, of all ranks that hold the same shard of a parameter, this one counts it."""
    if not isinstance(param, DTensor):
        return True
    replicated = [axis for axis, placement in enumerate(param.placements) if sharded_dim(placement) is None]
    return all(param.device_mesh.get_local_rank(axis) == 0 for axis in replicated)


def token_weights(target_counts: list[int], reduction: Reduction) -> list[float]:
    """Return the weight of a target token in each micro-batch of a step, for the loss to be a weighted sum.

    `global_token` is the mean over all target tokens, `micro_batch_mean` the mean of micro-batches' means, as InternLM.
    """
    total, n_batches = sum(target_counts), len(target_counts)
    if reduction is Reduction.global_token:
        return [1 / total if total else 0.0] * n_batches
    return [1 / (n_batches * count) if count else 0.0 for count in target_counts]
