"""Find the first module with non-finite values, in forward or backward, on any rank."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from parallel.shards import ParamShard


class Event(NamedTuple):
    """A non-finite tensor. Events sort in the order of computation, so that the smallest one is the cause."""

    kind: int  # 0 a weight, 1 an activation or its gradient, 2 a weight's gradient
    micro_batch: int
    backward: bool
    layer: int  # negated in the backward pass
    index: int  # of the module within the model; negated in the backward pass
    text: str


class NonfiniteWatch:
    """A context manager that records every non-finite output and gradient of a model's modules."""

    def __init__(self, model: nn.Module) -> None:
        self.events: list[Event] = []
        self.leaves = [(name, m) for name, m in model.named_modules() if name and not list(m.children())]
        self.index = {name: index for index, (name, _) in enumerate(self.leaves)}
        self.seen = dict.fromkeys(self.index, 0)

    def __enter__(self) -> "NonfiniteWatch":
        self.hooks = [module.register_forward_hook(partial(self._hook, name)) for name, module in self.leaves]
        torch.compiler.set_stance("force_eager")  # compiled blocks do not call hooks
        return self

    def __exit__(self, *_: object) -> None:
        torch.compiler.set_stance("default")
        for hook in self.hooks:
            hook.remove()

    def check_params(self, params: Mapping[str, ParamShard]) -> None:
        for name, param in params.items():
            self._check(param.shard, 0, 0, False, name.rpartition(".")[0], f"{name} (weight)")
            if param.grad is not None:
                self._check(param.grad, 2, 0, True, name.rpartition(".")[0], f"{name} (gradient)")

    def _hook(self, name: str, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        # Skip recomputation by activation checkpointing, which no public API detects.
        if torch._C._current_graph_task_id() != -1:
            return
        micro_batch = self.seen[name]
        self.seen[name] += 1
        self._check(output, 1, micro_batch, False, name, f"{name} (forward)")
        if output.requires_grad:
            output.register_hook(lambda grad: self._check(grad, 1, micro_batch, True, name, f"{name} (backward)"))

    def _check(self, tensor: Tensor, kind: int, micro_batch: int, backward: bool, module: str, text: str) -> None:
        if not torch.isfinite(tensor).all():
            sign = -1 if backward else 1
            layer, index = sign * layer_of(module), sign * self.index[module]
            self.events.append(Event(kind, micro_batch, backward, layer, index, text))


def layer_of(name: str) -> int:
    """Return a module's layer: -1 for the embedding, large for norm and head."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" else -1 if parts[0] == "embed" else 1 << 30
