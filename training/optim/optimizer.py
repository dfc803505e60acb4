"""An update rule applied to a model: master weights, sharded state, rates on the device, checkpoint names."""

import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from types import MappingProxyType

import torch
from torch import Tensor, nn

from parallel.tensor_parallel import local
from training.config import OPTIMIZERS, Decay, Dtype, OptimizerConfig, TrainingError
from training.optim.master_weights import MasterWeights, like

# Numbers updated by one call of a rule: enough for a full launch, little enough that their fp32 copies are a small
# part of memory.
CHUNK_NUMEL = 1 << 27
State = dict[str, dict[str, Tensor]]  # by state name, then by parameter


@dataclass(slots=True)
class Chunk:
    """Parameters that a rule updates together, as this process's shards; the lists are parallel."""

    names: list[str]
    params: list[nn.Parameter]  # as the model has them: their shapes, layouts and raw gradients
    masters: list[Tensor]  # fp32, to be updated in place
    state: dict[str, list[Tensor]]  # fp32, by the rule's state_names, to be updated in place
    grad_scale: Tensor
    lr: float
    beta2: float
    weight_decay: float
    update: int  # number of this update; the first is 1

    @property
    def scaled_grads(self) -> list[Tensor]:
        """fp32 gradients, still multiplied by `grad_scale`."""
        return [gradient(param).float() for param in self.params]

    @property
    def grads(self) -> list[Tensor]:
        """fp32 gradients."""
        return [grad / self.grad_scale for grad in self.scaled_grads]


class UpdateRule:
    """How parameters follow from gradients; everything else is `Optimizer`'s business.

    A subclass names its state, tensors shaped as the parameter and zero at first, and writes `update`.
    """

    state_names: tuple[str, ...] = ()
    on_device = False  # True: `update_raw` is called instead of `update`

    def __init__(self, config: OptimizerConfig, device: torch.device) -> None:
        self.config = config

    def update(self, chunk: Chunk) -> None:
        """Update masters and state in place."""
        raise NotImplementedError

    def rates(self, lr: float, beta2: float, update: int) -> tuple[float, ...]:
        """Return what `update_raw` reads of an update (the first is 1): `lr`, `beta2`, and numbers of its own."""
        return lr, beta2

    def update_raw(
        self, weights: MasterWeights, state: State, names: list[str], weight_decay: float, rates: Tensor,
        grad_scale: Tensor, finite: Tensor,
    ) -> None:  # fmt: skip
        """Update the named parameters where they are, if `finite`, without waiting for the device."""
        raise NotImplementedError


class Optimizer:
    """Runs a rule over a model's parameters; nothing here waits for the device if the rule does not.

    `tied_params` are parameters that always equal another one, by name: they are updated like it and saved under its
    name. A checkpoint has `model.<param>`, `optimizer.<param>.<state name>` and `optimizer.<param>.step`, all fp32.
    """

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, rule: type[UpdateRule], tied_params: Mapping[str, str]
    ) -> None:
        self.config, self.tied_params = config, tied_params
        self.params = dict(model.named_parameters())
        self.weights = MasterWeights(self.params)
        self.device = next(iter(self.weights.shards.values())).device
        self.rule = rule(config, self.device)
        dtype = torch.bfloat16 if config.state_dtype is Dtype.bf16 else torch.float32
        self.state: State = {
            key: {name: torch.zeros_like(shard, dtype=dtype) for name, shard in self.weights.shards.items()}
            for key in self.rule.state_names
        }
        self.groups: dict[float, list[str]] = {}  # names by weight decay
        for name in self.params:
            self.groups.setdefault(self.weight_decay(name), []).append(name)
        self.updates = torch.zeros((), device=self.device)  # made so far
        self.row = torch.zeros(1, dtype=torch.int64, device=self.device)  # of the schedule, for the next update
        self.schedule_UR = torch.zeros(0, 2, dtype=torch.float64, device=self.device)

    def weight_decay(self, name: str) -> float:
        decays = self.config.decay is Decay.all or self.params[name].ndim >= 2
        return self.config.weight_decay if decays else 0.0

    def set_schedule(self, rates: Sequence[tuple[float, float]]) -> None:
        """Put the learning rate and beta2 of all updates to come on the device, where steps read them."""
        first = int(self.updates) + 1
        rows = [self.rule.rates(lr, beta2, update) for update, (lr, beta2) in enumerate(rates, first)]
        self.schedule_UR = torch.tensor(rows, dtype=torch.float64).to(self.device)
        self.row.zero_()

    @torch.no_grad()
    def step(self, *, grad_scale: Tensor, finite: Tensor) -> Tensor:
        """Update from the gradients divided by `grad_scale`, if `finite`, and drop the gradients.

        Both are scalars on the device. Return learning rate and beta2, fp64 (2,), on the device.
        """
        # index_select, because indexing by a tensor of one number would read it on the host.
        rates = self.schedule_UR.index_select(0, self.row)[0]
        if self.rule.on_device:
            for weight_decay, names in self.groups.items():
                self.rule.update_raw(self.weights, self.state, names, weight_decay, rates, grad_scale, finite)
        elif bool(finite):
            self._update_in_chunks(rates, grad_scale)
        for param in self.params.values():
            param.grad = None
        self.updates += finite
        self.row += finite
        return rates[:2]

    def _update_in_chunks(self, rates: Tensor, grad_scale: Tensor) -> None:
        lr, beta2 = rates[:2].tolist()
        update = int(self.updates) + 1
        for weight_decay, names in self._chunks():
            params, masters = [self.params[n] for n in names], [self.weights.read(n) for n in names]
            state = {key: [tensors[n].float() for n in names] for key, tensors in self.state.items()}
            self.rule.update(Chunk(names, params, masters, state, grad_scale, lr, beta2, weight_decay, update))
            for i, name in enumerate(names):
                self.weights.write(name, masters[i])
                for key, tensors in self.state.items():
                    tensors[name].copy_(state[key][i])

    def _chunks(self) -> Iterator[tuple[float, list[str]]]:
        """Yield weight decays and names, in groups of about `CHUNK_NUMEL` numbers."""
        for weight_decay, names in self.groups.items():
            ends = accumulate(self.weights.shards[name].numel() for name in names)
            chunks = (end // CHUNK_NUMEL for end in ends)
            for _, chunk in groupby(zip(chunks, names, strict=True), lambda pair: pair[0]):
                yield weight_decay, [name for _, name in chunk]

    @torch.no_grad()
    def state_tensors(self) -> dict[str, Tensor]:
        """Return everything to save, by checkpoint name; `load_tensors` is the inverse.

        What the device does not hold in fp32 is put together on the CPU.
        """
        saved = {}
        for name, param in self.params.items():
            saved_as = self.tied_params.get(name, name)
            saved[f"model.{saved_as}"] = self.weights.to_save(name)
            for key, tensors in self.state.items():
                tensor = tensors[name] if tensors[name].dtype == torch.float32 else tensors[name].cpu().float()
                saved[f"optimizer.{saved_as}.{key}"] = like(param, tensor)
            saved[f"optimizer.{saved_as}.step"] = self.updates
        return saved

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over the tensors of `state_tensors()` after a checkpoint was read into them."""
        for name in self.params:
            saved_as = self.tied_params.get(name, name)
            self.weights.write(name, local(tensors[f"model.{saved_as}"]).to(self.device))
            for key, state in self.state.items():
                state[name].copy_(local(tensors[f"optimizer.{saved_as}.{key}"]))


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, tied_params: Mapping[str, str] = MappingProxyType({})
) -> Optimizer:
    """Return the optimizer that `config.name` asks for: one of `OPTIMIZERS`, or `module:Class`."""
    try:
        rule = pkgutil.resolve_name(OPTIMIZERS.get(config.name, config.name))
    except (ImportError, AttributeError) as error:
        raise TrainingError(f"optimizer.name ({config.name}) cannot be imported: {error}") from error
    return Optimizer(model, config, rule, tied_params)


def gradient(param: nn.Parameter) -> Tensor:
    """Return the gradient of this process's shard of a parameter."""
    assert param.grad is not None, "an update needs every gradient"
    return local(param.grad)
