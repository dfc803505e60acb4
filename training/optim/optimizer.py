"""The optimizer: update rules, master weights, sharded state, schedule and checkpoint names."""

import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from model.layers import Scales, scales_of
from model.transformer import Transformer
from parallel.shards import ParamShard, local, whole_params
from training.config import OPTIMIZERS, Decay, Dtype, OptimizerConfig, TrainingError
from training.optim.master_weights import MasterWeights, Parts, whole

CHUNK_NUMEL = 1 << 27  # elements per call of a rule, whose fp32 copies must fit in memory
UPDATE = "optimizer.update"  # name in profiles
State = dict[str, dict[str, Tensor]]  # by state name, then by parameter


class Group(NamedTuple):
    """Settings that parameters share to be updated together."""

    rule: "UpdateRule"
    lr_scale: float
    weight_decay: float
    eps: float


@dataclass(slots=True)
class Chunk:
    """Parameters that a rule updates in one call, as this rank's shards; the lists are parallel."""

    names: list[str]
    params: list[ParamShard]  # full shapes, layouts and raw gradients
    masters: list[Tensor]  # fp32, updated in place
    state: dict[str, list[Tensor]]  # fp32, by the rule's state_names, updated in place
    grad_scale: Tensor
    lr: float
    beta2: float
    weight_decay: float
    eps: float
    update: int  # number of this update; the first is 1

    @property
    def scaled_grads(self) -> list[Tensor]:
        """fp32 gradients times `grad_scale`."""
        return [gradient(param).float() for param in self.params]

    @property
    def grads(self) -> list[Tensor]:
        """fp32 gradients."""
        return [grad / self.grad_scale for grad in self.scaled_grads]


class UpdateRule:
    """An optimizer's update of parameters; `Optimizer` does everything else.

    A subclass lists its `state_names` (tensors of the parameter's shape, initially zero) and implements `update`.
    `params` are the parameters that it updates, by name.
    """

    state_names: tuple[str, ...] = ()
    separable = False  # True: parameters may be updated in several calls
    on_device = False  # True: call `update_raw` instead of `update`
    size_free = False  # True: the learning rate needs no scaling by `model.parametrization`

    def __init__(self, config: OptimizerConfig, params: Mapping[str, ParamShard]) -> None:
        self.config, self.params = config, params

    @classmethod
    def takes(cls, name: str, param: ParamShard) -> bool:
        """Return whether the rule updates a parameter; AdamW updates the rest."""
        return True

    def new_state(self, shard: Tensor) -> dict[str, Tensor]:
        """Return the initial state of a shard: tensors of its shape, or of one column with as many rows."""
        return {key: torch.zeros_like(shard) for key in self.state_names}

    def flops(self) -> int:
        """Return the FLOPs of an update's matrix products on the rank with the most."""
        return 0

    def update(self, chunk: Chunk) -> None:
        """Update masters and state in place."""
        raise NotImplementedError

    def rates(self, lr: float, beta2: float, update: int) -> tuple[float, ...]:
        """Return the scalars that `update_raw` reads at an update, counted from 1: `lr`, `beta2`, and more."""
        return lr, beta2

    def update_raw(
        self, weights: MasterWeights, state: State, names: list[str], group: Group, rates: Tensor,
        grad_scale: Tensor, finite: Tensor,
    ) -> None:  # fmt: skip
        """Update the named parameters in place if `finite`, without synchronizing with the device."""
        raise NotImplementedError


class Optimizer:
    """Updates a model's parameters by the rule `config.name` or, those that it does not take, by AdamW.

    Does not synchronize with the device unless a rule does. `params` are the shards of a distributed model. Parameters
    in the model's `tied_params` are updated like the one that they equal, and saved under its name.
    A checkpoint has `model.<param>`, `optimizer.<param>.<state name>` and `optimizer.<param>.step`, all fp32.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, params: dict[str, ParamShard] | None = None) -> None:
        try:
            rules = dict.fromkeys(pkgutil.resolve_name(OPTIMIZERS.get(name, name)) for name in (config.name, "adamw"))
        except (ImportError, AttributeError) as error:
            raise TrainingError(f"optimizer.name ({config.name}) cannot be imported: {error}") from error
        self.config, self.params = config, params or whole_params(model)
        self.model_config = model.config if isinstance(model, Transformer) else None
        self.tied_params: Mapping[str, str] = getattr(model, "tied_params", {})
        self.weights = MasterWeights(self.params)
        self.device = next(iter(self.weights.shards.values())).device
        first = {name: next(rule for rule in rules if rule.takes(name, p)) for name, p in self.params.items()}
        taken = {rule: {name: p for name, p in self.params.items() if first[name] is rule} for rule in rules}
        self.rules = [rule(config, params) for rule, params in taken.items() if params]
        dtype = torch.bfloat16 if config.state_dtype is Dtype.bf16 else torch.float32
        self.state: State = {}
        self.groups: dict[Group, list[str]] = {}
        for rule in self.rules:
            for name in rule.params:
                for key, tensor in rule.new_state(self.weights.shards[name]).items():
                    self.state.setdefault(key, {})[name] = tensor.to(dtype)
                self.groups.setdefault(self.group(rule, name), []).append(name)
        self.updates = torch.zeros((), device=self.device)  # number of updates so far
        self.row = torch.zeros(1, dtype=torch.int64, device=self.device)  # of the schedule, for the next update
        self.schedule_UR = torch.zeros(0, 2, dtype=torch.float64, device=self.device)
        self.schedules_UR: dict[tuple[UpdateRule, float], Tensor] = {}  # a rule's `rates`, by lr_scale

    def group(self, rule: UpdateRule, name: str) -> Group:
        config, n_dims = self.config, self.params[name].ndim
        scales = scales_of(self.model_config, name, n_dims) if self.model_config and not rule.size_free else Scales()
        kind = "vector" if n_dims == 1 else self.tied_params.get(name, name).partition(".")[0]
        lr_scale = {
            "embed": config.embed_lr_scale, "head": config.head_lr_scale, "vector": config.vector_lr_scale
        }.get(kind, 1.0)  # fmt: skip
        decays = config.decay is Decay.all or n_dims >= 2
        weight_decay = config.weight_decay * scales.weight_decay if decays else 0.0
        return Group(rule, lr_scale * scales.lr, weight_decay, config.eps * scales.eps)

    def set_schedule(self, rates: Sequence[tuple[float, float]]) -> None:
        """Set learning rate and beta2 of all remaining updates; stored on the device."""
        first = int(self.updates) + 1
        self.schedule_UR = torch.tensor(rates, dtype=torch.float64).view(-1, 2).to(self.device)
        for rule, scale, *_ in self.groups:
            rows = [rule.rates(lr * scale, beta2, update) for update, (lr, beta2) in enumerate(rates, first)]
            self.schedules_UR[rule, scale] = torch.tensor(rows, dtype=torch.float64).to(self.device)
        self.row.zero_()

    @torch.no_grad()
    def step(
        self, *, grad_scale: Tensor, finite: Tensor, on_updated: Callable[[Collection[str]], None] | None = None
    ) -> Tensor:
        """Update with the gradients divided by `grad_scale`, if `finite`, and free the gradients.

        Both are scalars on the device. `on_updated` is called with the names of all parameters updated so far, first
        after a single one if the rule is separable. Returns learning rate and beta2, fp64 (2,), on the device.
        """
        done: list[str] = []
        # index_select: indexing by a one-element tensor would synchronize.
        rates = {key: table_UR.index_select(0, self.row)[0] for key, table_UR in self.schedules_UR.items()}
        with record_function(UPDATE):
            for group, names in self.groups.items():
                scaled = rates[group.rule, group.lr_scale]
                parts = [names[:1], names[1:]] if group.rule.separable and not done and len(names) > 1 else [names]
                for part in parts:
                    if group.rule.on_device:
                        group.rule.update_raw(self.weights, self.state, part, group, scaled, grad_scale, finite)
                    elif bool(finite):
                        self._update_in_chunks(group, part, scaled, grad_scale)
                    done += part
                    if on_updated is not None:
                        on_updated(done)
        for param in self.params.values():
            param.shard.grad = None
        unscaled = self.schedule_UR.index_select(0, self.row)[0]
        self.updates += finite
        self.row += finite
        return unscaled

    def _update_in_chunks(self, group: Group, all_names: list[str], rates: Tensor, grad_scale: Tensor) -> None:
        rule, _, weight_decay, eps = group
        lr, beta2 = rates[:2].tolist()
        update = int(self.updates) + 1
        for names in self._chunks(all_names):
            params, masters = [self.params[n] for n in names], [self.weights.read(n) for n in names]
            stored = dict(self._state_of(names[0]))
            state = {key: [tensors[n].float() for n in names] for key, tensors in stored.items()}
            rule.update(Chunk(names, params, masters, state, grad_scale, lr, beta2, weight_decay, eps, update))
            for i, name in enumerate(names):
                self.weights.write(name, masters[i])
                for key, tensors in stored.items():
                    tensors[name].copy_(state[key][i])

    def _chunks(self, names: list[str]) -> Iterator[list[str]]:
        """Yield names in groups of about `CHUNK_NUMEL` elements."""
        ends = accumulate(self.weights.shards[name].numel() for name in names)
        chunks = (end // CHUNK_NUMEL for end in ends)
        for _, chunk in groupby(zip(chunks, names, strict=True), lambda pair: pair[0]):
            yield [name for _, name in chunk]

    @torch.no_grad()
    def state_tensors(self) -> dict[str, Tensor]:
        """Return all tensors to save, by checkpoint name; `load_tensors` is the inverse.

        Tensors that are not fp32 on the device are converted on the CPU.
        """
        return {name: laid_out(whole(parts)) for name, (laid_out, parts) in self.saved_parts().items()}

    def saved_parts(self) -> dict[str, tuple[Callable[[Tensor], Tensor], Parts]]:
        """Return by checkpoint name the parts of each tensor to save, and what lays out the whole."""
        saved: dict[str, tuple[Callable[[Tensor], Tensor], Parts]] = {}
        for name, param in self.params.items():
            saved_as = self.tied_params.get(name, name)
            saved[f"model.{saved_as}"] = param.laid_out, self.weights.parts(name)
            for key, tensors in self._state_of(name):
                saved[f"optimizer.{saved_as}.{key}"] = param.laid_out, (tensors[name],)
            saved[f"optimizer.{saved_as}.step"] = (lambda updates: updates), (self.updates,)
        return saved

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load the tensors of `state_tensors()`, into which a checkpoint has been read."""
        for name in self.params:
            saved_as = self.tied_params.get(name, name)
            self.weights.write(name, local(tensors[f"model.{saved_as}"]).to(self.device))
            for key, state in self._state_of(name):
                state[name].copy_(local(tensors[f"optimizer.{saved_as}.{key}"]))

    @torch.no_grad()
    def load_weights(self, wholes: Mapping[str, Tensor]) -> None:
        """Load full weights, by parameter."""
        for name, param in self.params.items():
            whole = wholes[self.tied_params.get(name, name)]
            self.weights.write(name, param.take(whole).to(self.device, torch.float32))

    def _state_of(self, name: str) -> list[tuple[str, dict[str, Tensor]]]:
        return [(key, tensors) for key, tensors in self.state.items() if name in tensors]


def gradient(param: ParamShard) -> Tensor:
    assert param.grad is not None
    return param.grad
