"""The step: forward, backward, one global norm, one clip, one update, or none if a number is not finite."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from parallel.mesh import Mesh

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


class Scaler(Protocol):
    scale: float
    dynamic: bool

    def update(self, *, finite: bool) -> None: ...


# (h_ND, weight_VD, labels_N, loss_weights_N) -> weighted loss, nll_N, correct_N
LinearLoss = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
TokenWeights = Callable[[list[int]], list[float]]


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


class Engine:
    """Runs steps of one model and one optimizer on a mesh, without waiting for the device."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        mesh: Mesh,
        *,
        linear_loss: LinearLoss,
        token_weights: TokenWeights,
        scaler: Scaler,
        max_grad_norm: float,
        n_sources: int,
        bytes_per_token: Tensor | None,
        counts: Sequence[int] = (0, 0, 0),
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.mesh = mesh
        self.linear_loss = linear_loss
        self.token_weights = token_weights
        self.scaler = scaler
        self.max_grad_norm = max_grad_norm
        self.n_sources = n_sources
        self.bytes_per_token = None if bytes_per_token is None else bytes_per_token.to(mesh.device)
        # updates, steps without a finite gradient, how many of these were the last ones
        self.counts_3 = torch.tensor(counts, dtype=torch.int64).to(mesh.device)

    def counts(self) -> tuple[int, int, int]:
        """Wait for all steps; gives the updates, the steps without a finite gradient, and how many came last."""
        updates, bad_steps, bad_in_a_row = self.counts_3.tolist()
        return updates, bad_steps, bad_in_a_row

    def train_step(self, batches: Sequence[MicroBatch]) -> StepResult:
        """Run the micro-batches of one step and update the weights, unless the gradient is not finite."""
        counts = [int((batch.labels_BT != IGNORED).sum()) for batch in batches]
        loss = torch.zeros((), device=self.mesh.device)
        totals_S4 = self._no_totals()
        for batch, weight in zip(batches, self.token_weights(counts), strict=True):
            scaled_loss = self._forward(batch, weight * self.scaler.scale, totals_S4)
            scaled_loss.backward()
            loss += scaled_loss.detach()
        loss /= self.scaler.scale
        grad_norm = self._grad_norm()
        finite = torch.isfinite(grad_norm)
        # The clip and the loss scale are one division, done inside the update.
        clip = ((grad_norm + 1e-6) / self.max_grad_norm).clamp(min=1.0) if self.max_grad_norm > 0 else 1.0
        rates_2 = self.optimizer.step(grad_scale=torch.ones_like(grad_norm) * clip * self.scaler.scale, finite=finite)
        self._count(finite)
        if self.scaler.dynamic:  # the next step's scale is a number of the host's
            self.scaler.update(finite=bool(finite))
        n_tokens = sum(batch.tokens_BT.numel() for batch in batches)
        self._drop_gradients()
        return StepResult(loss, grad_norm, finite, rates_2, n_tokens, sum(counts), totals_S4)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> Tensor:
        """Score batches without training; gives totals_S4 as in `StepResult`."""
        totals_S4 = self._no_totals()
        for batch in batches:
            self._forward(batch, 0.0, totals_S4)
        return totals_S4

    def first_bad_layer(self, batches: Sequence[MicroBatch]) -> str:
        """Run a step's passes again, without an update, and name the first module whose numbers are not finite."""
        bad: list[str] = []

        def note(name: str, kind: str, tensor: Tensor) -> None:
            if not torch.isfinite(tensor).all():
                bad.append(f"{name} ({kind})")

        def watch(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
                note(name, "forward", output)
                if output.requires_grad:
                    output.register_hook(partial(note, name, "backward"))

            return hook

        leaves = [(name, m) for name, m in self.model.named_modules() if name and not list(m.children())]
        hooks = [module.register_forward_hook(watch(name)) for name, module in leaves]
        torch.compiler.set_stance("force_eager")  # a compiled block does not call the hooks
        try:
            for name, param in self.model.named_parameters():
                if not torch.isfinite(param).all():
                    return f"{name} (weight)"
            counts = [int((batch.labels_BT != IGNORED).sum()) for batch in batches]
            for batch, weight in zip(batches, self.token_weights(counts), strict=True):
                self._forward(batch, weight * self.scaler.scale, self._no_totals()).backward()
                if bad:
                    return bad[0]
            norms = ((n, p.grad) for n, p in reversed(list(self.model.named_parameters())))
            wrong = (n for n, grad in norms if grad is not None and not torch.isfinite(grad).all())
            return next((f"{n} (gradient)" for n in wrong), "the sum of finite gradients overflowed")
        finally:
            torch.compiler.set_stance("default")
            for hook in hooks:
                hook.remove()
            self._drop_gradients()

    def _forward(self, batch: MicroBatch, weight: float, totals_S4: Tensor) -> Tensor:
        """Give the weighted loss of a micro-batch and add its sums to `totals_S4`."""
        device = self.mesh.device
        labels_N = batch.labels_BT.to(device, non_blocking=True).flatten()
        source_N = batch.source_BT.to(device, non_blocking=True).flatten()
        weights_N = torch.where(labels_N == IGNORED, 0.0, weight).float()

        def head(h_BTD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.linear_loss(h_BTD.flatten(0, 1), weight_VD, labels_N, weights_N)

        loss, nll_N, correct_N = self.model(
            batch.tokens_BT.to(device, non_blocking=True),
            positions_BT=batch.positions_BT.to(device, non_blocking=True),
            cu_seqlens=batch.cu_seqlens.to(device, non_blocking=True),
            max_seq_len=batch.max_seq_len,
            head=head,
        )
        target_N = labels_N != IGNORED
        if self.bytes_per_token is None:
            bytes_N = torch.zeros_like(nll_N)
        else:
            bytes_N = self.bytes_per_token[labels_N.clamp(min=0)] * target_N
        rows_N4 = torch.stack([nll_N.double(), correct_N.double(), target_N.double(), bytes_N.double()], dim=1)
        totals_S4.index_add_(0, source_N, rows_N4)
        return loss

    def _no_totals(self) -> Tensor:
        return torch.zeros(self.n_sources, 4, dtype=torch.float64, device=self.mesh.device)

    def _count(self, finite: Tensor) -> None:
        updates, bad_steps, bad_in_a_row = self.counts_3.unbind()
        in_a_row = torch.where(finite, 0, bad_in_a_row + 1)
        self.counts_3 = torch.stack([updates + finite, bad_steps + ~finite, in_a_row])

    def _grad_norm(self) -> Tensor:
        """The 2-norm over all gradients, without the loss scale; each parameter is counted once."""
        for param in self.model.parameters():
            if param.grad is None:  # a step without a single target
                param.grad = torch.zeros_like(param)
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in self.model.parameters()]
        return torch.linalg.vector_norm(torch.stack(norms)) / self.scaler.scale

    def _drop_gradients(self) -> None:
        for param in self.model.parameters():
            param.grad = None
