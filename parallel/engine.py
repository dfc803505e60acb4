"""The training step: forward, backward, global norm, clipping, update; no update if the norm is not finite."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.batches import IGNORED, Batch
from model.layers import AuxLosses
from model.loss import linear_cross_entropy
from parallel.config import ParallelError
from parallel.graphs import Graphs, Position, zero_grad
from parallel.nonfinite import NonfiniteWatch
from parallel.parallelize import ParallelModel
from parallel.tensor_parallel import VocabularyShard
from training.config import Dtype, LossConfig, PrecisionConfig, Reduction

if TYPE_CHECKING:
    from parallel.pipeline import Inputs

Head = Callable[[Tensor, Tensor], Tensor]  # of the last hidden states h_BTD and the head's weight_VD


@dataclass(slots=True)
class StepResult:
    """The result of a step over all ranks. Tensors are on the device; reading one synchronizes."""

    loss: Tensor  # scalar: the weighted sum of the token losses
    grad_norm: Tensor  # scalar, over all parameters, before clipping
    finite: Tensor  # scalar; False: no update was made
    rates_2: Tensor  # learning rate and beta2 of the update
    totals_S4: Tensor  # float64, per source: sum of nll, correct, targets, bytes
    aux: dict[str, Tensor]  # auxiliary losses by name: summed over layers, mean over micro-batches
    n_tokens: int  # including padding and masked tokens
    n_targets: int


@dataclass(slots=True)
class Sums:
    """This rank's sums over the micro-batches of a step."""

    loss: Tensor
    totals_S4: Tensor
    aux_weight: Tensor  # scalar: weight of auxiliary losses in the backward pass
    aux: dict[str, Tensor] = field(default_factory=dict)  # auxiliary losses by name

    def zero_(self) -> None:
        for tensor in (self.loss, self.totals_S4, *self.aux.values()):
            tensor.zero_()


class LossScaler:
    """A loss scale for fp16 that grows after `growth_interval` finite steps and falls after repeated overflows.

    As in InternLM's `DynamicGradScaler`, the first `hysteresis` overflows do not lower the scale, each further one
    does, and growth resets the count. The scale of bf16 and fp32 is 1.
    """

    def __init__(self, config: PrecisionConfig) -> None:
        self.config = config
        self.dynamic = config.compute is Dtype.fp16
        self.scale = config.initial_scale if self.dynamic else 1.0
        self.finite_steps = self.overflows = 0

    def update(self, *, finite: bool) -> None:
        """Record whether a step's gradients were finite; only of a `dynamic` scale."""
        config = self.config
        if finite:
            self.finite_steps += 1
            if self.finite_steps == config.growth_interval:
                self.finite_steps = self.overflows = 0
                self.scale = min(self.scale * config.growth_factor, config.max_scale)
        else:
            self.finite_steps = 0
            self.overflows += 1
            if self.overflows > config.hysteresis:
                self.scale = max(self.scale * config.backoff_factor, config.min_scale)

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "finite_steps": self.finite_steps, "overflows": self.overflows}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale = float(state["scale"])
        self.finite_steps, self.overflows = int(state["finite_steps"]), int(state["overflows"])


class Engine:
    """Runs training steps on a mesh, without synchronizing with the device.

    `optimizer` is a `training.optim.optimizer.Optimizer`; `counts_3` are updated as `count_step` does.
    `bytes_per_token` (V,) is the length of each token's text, if known; `n_sources` is S.
    """

    def __init__(
        self,
        model: ParallelModel,
        optimizer: Any,
        scaler: LossScaler,
        counts_3: Tensor,
        *,
        loss: LossConfig,
        max_grad_norm: float,
        n_sources: int = 1,
        bytes_per_token: Tensor | None = None,
    ) -> None:
        self.model, self.optimizer, self.mesh = model.module, optimizer, model.mesh
        self.params, self.partial_grads, self.zero = model.params, model.partial_grads, model.zero
        self.scaler, self.counts_3, self.max_grad_norm = scaler, counts_3, max_grad_norm
        mesh, on_graphs = model.mesh, model.layout.cuda_graphs
        self.limits_2 = torch.full((2,), math.inf, device=mesh.device)  # no update if loss or norm is above
        tied = self.model.tied_params
        self.counted = [p for name, p in self.params.items() if name not in tied and p.is_first_copy]
        tp_mesh = mesh.param_mesh["tp"] if mesh.param_mesh is not None and mesh.axes.tp > 1 else None
        self.vocabulary = tp_mesh and VocabularyShard(tp_mesh, self.model.config.vocab_size)
        self.reduction, self.n_sources = loss.reduction, n_sources
        smoothing, z_loss = loss.label_smoothing, loss.z_loss
        self.linear_loss: Callable[..., tuple[Tensor, Tensor, Tensor]] = partial(
            linear_cross_entropy, chunk_tokens=loss.chunk_tokens, label_smoothing=smoothing, z_loss=z_loss
        )
        self.bytes_per_token = None if bytes_per_token is None else bytes_per_token.to(mesh.device)
        self.aux_names: list[str] | None = None  # of all ranks; known after the first step
        self.pipeline = None
        if mesh.axes.pp > 1:
            from parallel.pipeline import Pipeline

            self.pipeline = Pipeline(model)
        if on_graphs and mesh.device.type != "cuda":
            what = f"parallel.cuda_graphs (true) needs a CUDA device, not {mesh.device}"
            raise ParallelError(f"{what}; set it to false")
        self.graphs = self.graphs_on(torch.cuda.Stream(mesh.device)) if on_graphs else None

    def graphs_on(self, stream: torch.cuda.Stream | None) -> Graphs:
        return Graphs(self.model.parameters(), self._run_one, self._update, self._no_sums(), stream, self.zero)

    def train_step(self, batches: Sequence[Batch]) -> StepResult:
        """Run the micro-batches of a step; update the weights if the gradient is finite."""
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
        if self.scaler.dynamic:  # computed on the host
            self.scaler.update(finite=bool(finite))
        self._drop_gradients()
        n_tokens = sum(batch.tokens_BT.numel() for batch in batches) * self.mesh.dp_size
        return StepResult(loss, grad_norm, finite, rates_2, totals_S4, aux, n_tokens, sum(counts))

    def _update(self, sums: Sums) -> Sequence[Tensor]:
        """Update the weights; return loss, norm, finite, rates_2, totals_S4 and auxiliary losses."""
        self._finish_gradients()
        loss, grad_norm, totals_S4, *aux = self._reduce(sums, self._grad_norm())
        loss, grad_norm = loss / self.scaler.scale, grad_norm / self.scaler.scale
        finite = torch.isfinite(grad_norm) & (torch.stack([loss, grad_norm]) <= self.limits_2).all()
        # Clipping and loss scale become one division inside the update.
        clip = ((grad_norm + 1e-6) / self.max_grad_norm).clamp(min=1.0) if self.max_grad_norm > 0 else 1.0
        grad_scale = torch.ones_like(grad_norm) * clip * self.scaler.scale
        on_updated = self.zero and self.zero.gather_early
        rates_2 = self.optimizer.step(grad_scale=grad_scale, finite=finite, on_updated=on_updated)
        if self.zero is not None:
            self.zero.end_update()
        count_step(self.counts_3, finite)
        return loss, grad_norm, finite, rates_2, totals_S4, *aux

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], n_sources: int | None = None, head: Head | None = None) -> Tensor:
        """Run forward passes; return totals_S4 as in `StepResult`.

        `n_sources` overrides S; `head` is called on the last hidden states instead of the loss.
        """
        sums = self._no_sums(n_sources=n_sources)
        self._gather()
        try:
            for batch in batches:
                tokens_BT, kwargs = self._inputs(batch, 0.0, sums)
                kwargs = {**kwargs, "head": head or kwargs["head"]}
                if self.pipeline is None:
                    self.model(tokens_BT, **kwargs)
                else:
                    self.pipeline.evaluate(tokens_BT, kwargs)
        finally:
            if self.zero is not None:
                self.zero.stream.join()  # before memory is freed that it may still write
                self.zero.free()
        return self.mesh.sum_(sums.totals_S4 * (self.mesh.coordinate("tp") == 0))

    def find_nonfinite_module(self, batches: Sequence[Batch]) -> str:
        """Rerun a step without the update and return the first non-finite module of all ranks; a collective."""
        watch = NonfiniteWatch(self.model)
        try:
            watch.check_params(self.params)
            if not self.mesh.all_reduce_max(bool(watch.events)):
                _, weights, aux_weight = self._weights(batches)
                with watch:
                    self._run(batches, weights, self._no_sums(aux_weight))
                self._finish_gradients()
                watch.check_params(self.params)
            events = [event for events in self.mesh.gather(watch.events) for event in events]
            return min(events).text if events else "the sum of finite gradients overflowed"
        finally:
            self._drop_gradients()

    def _run(self, batches: Sequence[Batch], weights: Sequence[float], sums: Sums) -> None:
        """Run forward and backward passes, adding to `sums`."""
        if self.pipeline is None:
            for batch, weight, position in zip(batches, weights, Position.all_of(len(batches)), strict=True):
                self._run_one(batch, weight, sums, position)
        else:
            self._gather()
            inputs = [self._inputs(*pair, sums) for pair in zip(batches, weights, strict=True)]
            self.pipeline.train(inputs)
            for _, kwargs in inputs:
                self._add_aux(kwargs["aux"], sums)

    def _run_one(self, batch: Batch, weight: float | Tensor, sums: Sums, position: Position) -> None:
        if position.is_first:
            self._gather()
        if self.zero is not None:
            self.zero.begin_backward(0, first=position.is_first, last=position.is_last)
        tokens_BT, kwargs = self._inputs(batch, weight, sums)
        self.model(tokens_BT, **kwargs).backward()
        if self.zero is not None:
            self.zero.end_backward()
        self._add_aux(kwargs["aux"], sums)

    def _gather(self) -> None:
        if self.zero is not None:
            self.zero.gather()

    def _finish_gradients(self) -> None:
        """Finish the reduction of gradients, over ranks and over the copies of a tied parameter."""
        if self.zero is not None:
            self.zero.finish()
        for param in self.params.values():
            if param.grad is None:  # a step without targets
                param.shard.grad = zero_grad(param.shard)
        grads: list[Any] = [param.grad for name, param in self.params.items() if name in self.partial_grads]
        if grads and self.mesh.param_mesh is not None:
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat, group=self.mesh.param_mesh.get_group("tp"))
            for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(total.view_as(grad))
        if self.pipeline is not None and self.pipeline.tied:
            self.pipeline.sum_tied(self.params)

    def _add_aux(self, aux: AuxLosses, sums: Sums) -> None:
        for name, loss in aux.sums.items():
            sums.aux[name] = sums.aux.get(name, torch.zeros((), device=self.mesh.device))
            sums.aux[name] += loss  # in place, for CUDA graphs

    def _inputs(self, batch: Batch, weight: float | Tensor, sums: Sums) -> "Inputs":
        """Return this rank's tokens and the model's other arguments; the head returns the loss and adds to `sums`."""
        device, row_len = self.mesh.device, batch.tokens_BT.shape[1]
        length = row_len // self.mesh.axes.cp
        tokens_BT, labels_BT, positions_BT, source_BT = (
            x_BT.narrow(1, length * self.mesh.coordinate("cp"), length).to(device, non_blocking=True)
            for x_BT in (batch.tokens_BT, batch.labels_BT, batch.positions_BT, batch.source_BT)
        )
        labels_N = labels_BT.flatten()
        weights_N = torch.where(labels_N == IGNORED, 0.0, weight).float()

        def head(h_BTD: Tensor, weight_VD: Tensor) -> Tensor:
            per_token = [h_BTD.flatten(0, 1), labels_N, weights_N, source_BT.flatten()]
            if not torch.is_grad_enabled():  # contexts of tasks need no logits
                targets = (labels_N != IGNORED).nonzero()[:, 0]
                per_token = [x[targets] for x in per_token]
            h_ND, labels, weights, sources = per_token
            loss, nll_N, correct_N = self.linear_loss(h_ND, weight_VD, labels, weights, shard=self.vocabulary)
            sums.loss += loss.detach()
            target_N, lengths = labels != IGNORED, self.bytes_per_token
            bytes_N = torch.zeros_like(nll_N) if lengths is None else lengths[labels.clamp(min=0)] * target_N
            totals_N4 = torch.stack([x_N.double() for x_N in (nll_N, correct_N, target_N, bytes_N)], dim=1)
            sums.totals_S4.index_add_(0, sources, totals_N4)
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
        """Return the target counts of all ranks, this rank's token weights, and the weight of auxiliary losses.

        Auxiliary losses are averaged over micro-batches, and over cp and tp ranks, which have different tokens or
        parts of a layer.
        """
        counts = self.mesh.all_counts([int((batch.labels_BT != IGNORED).sum()) for batch in batches])
        weights = token_weights(counts, self.reduction)[self.mesh.dp_rank :: self.mesh.dp_size]
        scale, axes = self.scaler.scale, self.mesh.axes
        return counts, [weight * scale for weight in weights], scale / (len(counts) * axes.cp * axes.tp)

    def _reduce(self, sums: Sums, grad_norm: Tensor) -> Sequence[Tensor]:
        """Reduce loss, gradient norm, totals_S4 and auxiliary losses over all ranks."""
        if self.aux_names is None:  # they may differ between pipeline stages
            names = set(sums.aux)
            if self.mesh.axes.pp > 1 and self.mesh.all_reduce_max(bool(names)):
                names = names.union(*self.mesh.gather(names))
            self.aux_names = sorted(names)
        aux = [sums.aux[name] if name in sums.aux else torch.zeros_like(grad_norm) for name in self.aux_names]
        if self.mesh.world_size == 1:
            return sums.loss, grad_norm, sums.totals_S4, *aux
        is_first = self.mesh.coordinate("tp") == 0  # tp ranks have the same losses
        scalars = [x.double()[None] for x in (sums.loss * is_first, *aux, grad_norm.square())]
        figures = torch.cat([sums.totals_S4.flatten() * is_first, *scalars])
        self.mesh.sum_(figures)
        totals, (loss, *aux, square) = figures[: -len(scalars)], figures[-len(scalars) :].unbind()
        return loss.float(), square.sqrt().float(), totals.view_as(sums.totals_S4), *aux

    def _no_sums(self, aux_weight: float = 0.0, n_sources: int | None = None) -> Sums:
        zero = torch.zeros((), device=self.mesh.device)
        totals_S4 = zero.new_zeros(n_sources or self.n_sources, 4, dtype=torch.float64)
        return Sums(zero, totals_S4, torch.full_like(zero, aux_weight))

    def _grad_norm(self) -> Tensor:
        """Return the 2-norm of this rank's gradients, times the loss scale, without replicas."""
        grads = [param.grad for param in self.counted]
        if not grads:
            return torch.zeros((), device=self.mesh.device)
        foreach: Any = torch  # its types lack _foreach_norm
        return torch.linalg.vector_norm(torch.stack(foreach._foreach_norm(grads, 2, torch.float32)))

    def _drop_gradients(self) -> None:
        for param in self.params.values():
            param.shard.grad = None


def count_step(counts_3: Tensor, finite: Tensor) -> None:
    """Count a step on the device: updates, nonfinite steps, and consecutive nonfinite steps up to now."""
    updates, nonfinite_steps, nonfinite_in_a_row = counts_3.unbind()
    in_a_row = torch.where(finite, 0, nonfinite_in_a_row + 1)
    counts_3.copy_(torch.stack([updates + finite, nonfinite_steps + ~finite, in_a_row]))


def token_weights(target_counts: list[int], reduction: Reduction) -> list[float]:
    """Return the weight of a target token in each micro-batch of a step.

    `global_token` averages over all target tokens, `micro_batch_mean` over the means of micro-batches, as InternLM.
    """
    total, n_batches = sum(target_counts), len(target_counts)
    if reduction is Reduction.global_token:
        return [1 / total if total else 0.0] * n_batches
    return [1 / (n_batches * count) if count else 0.0 for count in target_counts]
