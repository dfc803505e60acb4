"""Which module was the first whose numbers were not finite, in whatever order and on whatever rank they were made."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Event(NamedTuple):
    """Something that was not finite. The least event is the one that others followed from."""

    kind: int  # 0 a weight, 1 an activation or its gradient, 2 a weight's gradient
    micro_batch: int
    backward: bool
    layer: int  # counted from the end in the backward pass
    number: int  # of the module in its layer's order, which is that of every rank; counted back in the backward pass
    text: str


class Watch:
    """A context in which a model's passes are watched."""

    def __init__(self, model: nn.Module) -> None:
        self.bad: list[Event] = []
        self.leaves = [(name, m) for name, m in model.named_modules() if name and not list(m.children())]
        self.order = {name: number for number, (name, _) in enumerate(self.leaves)}
        self.seen = dict.fromkeys(self.order, 0)

    def __enter__(self) -> "Watch":
        self.hooks = [module.register_forward_hook(partial(self._hook, name)) for name, module in self.leaves]
        torch.compiler.set_stance("force_eager")  # a compiled block does not call the hooks
        return self

    def __exit__(self, *_: object) -> None:
        torch.compiler.set_stance("default")
        for hook in self.hooks:
            hook.remove()

    def note_weight(self, name: str, weight: Tensor) -> None:
        self._note(weight, 0, 0, False, name.rpartition(".")[0], f"{name} (weight)")

    def note_gradient(self, name: str, gradient: Tensor) -> None:
        self._note(gradient, 2, 0, True, name.rpartition(".")[0], f"{name} (gradient)")

    def _hook(self, name: str, _module: nn.Module, _inputs: object, output: Any) -> None:
        # Private, because nothing public tells a forward pass from its repetition by activation checkpointing.
        if torch._C._current_graph_task_id() != -1:
            return
        micro_batch = self.seen[name]
        self.seen[name] += 1
        self._note(part(output), 1, micro_batch, False, name, f"{name} (forward)")
        if output.requires_grad:
            output.register_hook(lambda grad: self._note(part(grad), 1, micro_batch, True, name, f"{name} (backward)"))

    def _note(self, tensor: Tensor, kind: int, micro_batch: int, backward: bool, module: str, text: str) -> None:
        if not torch.isfinite(tensor).all():
            sign = -1 if backward else 1
            self.bad.append(
                Event(kind, micro_batch, backward, sign * layer_of(module), sign * self.order[module], text)
            )


def layer_of(name: str) -> int:
    """Give a module's place from the first to the last, the same on every rank."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" else -1 if parts[0] == "embed" else 1 << 30


def part(tensor: Any) -> Tensor:
    """Give this process' part of a tensor, without talking to the others."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
