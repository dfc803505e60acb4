"""Pipeline parallelism: the stages of a rank, run by the schedules of torch.distributed.pipelining.

Importing it brings in the whole compiler, which a run without a pipeline does not wait for.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining._backward import stage_backward_weight

from parallel.axes import stages_of
from parallel.config import ParallelConfig
from parallel.mesh import Mesh
from parallel.parallelize import set_gradient_sync, sharded_modules

SCHEDULES = {
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}
# Tokens, and what every stage is told of a micro-batch
Inputs = tuple[Tensor, Mapping[str, Any]]


class Hidden(nn.Module):
    """Hides from torch's stage that its model is one of FSDP's, which it would gather whole and reduce at the end."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Give the parameters that autograd knows, which are the gathered ones, even while they are freed."""
        if not isinstance(self.model, FSDPModule):
            return self.model.parameters(recurse)
        return chain.from_iterable(map(gathered, sharded_modules(self.model)))


class Stage(PipelineStage):
    """A stage that reduces gradients and frees parameters as the ZeRO stage has it, by FSDP's own hooks.

    A backward pass that is made in two, for inputs and later for weights, passes the hooks without gradients the first
    time and not at all the second, so what they do is done here, a block at a time as they would.
    """

    def __init__(self, model: nn.Module, *args: Any, zero_stage: int, **kwargs: Any) -> None:
        super().__init__(Hidden(model), *args, **kwargs)
        self.model, self.zero_stage = model, zero_stage

    def backward_maybe_with_nosync(self, backward_type: Any, bwd_kwargs: dict, last_backward: bool = False) -> Any:
        if isinstance(self.model, FSDPModule):
            set_gradient_sync(self.model, self.zero_stage, last=last_backward)
            if backward_type == "weight":
                self._weight_gradients(bwd_kwargs["param_groups"])
                return (), None
        return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)

    def _weight_gradients(self, param_groups: list[dict[str, Any]]) -> None:
        """Compute the gradients of weights, block by block, while the next block is gathered."""
        assert isinstance(self.model, FSDPModule)
        state = self.model._get_fsdp_state()
        # A hook of what gives a weight its gradient may be FSDP's: the pass is not over when autograd is done with it.
        state._state_ctx.post_backward_final_callback_queued = True
        whole, *parts = sharded_modules(self.model)
        modules = [module for module in (whole, *reversed(parts)) if gathered(module)]
        handles = (module.unshard(async_op=True) for module in modules)
        handle = next(handles)
        for module in modules:
            assert handle is not None
            handle.wait()
            handle = next(handles, None)
            params = gathered(module)
            nodes = {get_gradient_edge(param).node for param in params}
            stage_backward_weight(iter(params), [group for group in param_groups if nodes.issuperset(group["params"])])
            finish(module)
        # Private, as all of torch's own pipelining has it: nothing public ends a pass that was not one of autograd's.
        state._root_post_backward_final_callback()


def gathered(module: FSDPModule) -> list[nn.Parameter]:
    """Give a module's own parameters as its computations have them; the memory behind them may be freed."""
    group = module._get_fsdp_state()._fsdp_param_group
    return [] if group is None else [param.unsharded_param for param in group.fsdp_params]


def finish(module: FSDPModule) -> None:
    """Do with a module's gradients and parameters what FSDP does at the end of its backward pass."""
    group = module._get_fsdp_state()._fsdp_param_group
    assert group is not None
    group.post_backward()


class Pipeline:
    """Runs micro-batches through the stages of all ranks; `stages` are this one's, first to last.

    `model` is the configuration of the whole.
    """

    def __init__(self, stages: Sequence[nn.Module], mesh: Mesh, config: ParallelConfig, model: Any) -> None:
        assert mesh.param_mesh is not None
        self.mesh, self.config, self.d_model, self.tied = mesh, config, model.d_model, model.tie_embeddings
        self.stages = dict(zip(stages_of(mesh.coordinate("pp"), mesh.axes.pp, config), stages, strict=True))
        self.n_stages = mesh.axes.pp * config.virtual_stages
        self.rank_of = {s: rank for rank in range(mesh.axes.pp) for s in stages_of(rank, mesh.axes.pp, config)}
        self.group = mesh.param_mesh.get_group("pp")
        self.dtype = next(stages[0].parameters()).dtype
        self._schedules: dict[tuple[int, torch.Size], Any] = {}

    def train(self, inputs: Sequence[Inputs]) -> None:
        """Run the micro-batches of a step forward and backward."""
        schedule = self._schedule(len(inputs), inputs[0][0])
        args = [(tokens_BT,) if 0 in self.stages else () for tokens_BT, _ in inputs]
        # `step` would cut one large batch into equal pieces, which packs are not: their documents are of any number.
        schedule._split_inputs = lambda _args, _kwargs: (args, [dict(told) for _, told in inputs])
        schedule.step(target=torch.zeros(len(inputs)), losses=[], return_outputs=False)

    @torch.no_grad()
    def evaluate(self, tokens_BT: Tensor, told: Mapping[str, Any]) -> None:
        """Run a micro-batch forward."""
        x = tokens_BT
        for number in range(self.n_stages):
            if number not in self.stages:
                continue
            if number and number - 1 not in self.stages:
                x = torch.empty(self._hidden(tokens_BT), dtype=self.dtype, device=self.mesh.device)
                dist.recv(x, group=self.group, group_src=self.rank_of[number - 1])
            x = self.stages[number](x, **told)
            if number + 1 < self.n_stages and number + 1 not in self.stages:
                dist.send(x.contiguous(), group=self.group, group_dst=self.rank_of[number + 1])

    def add_up_tied(self, gradients: Mapping[str, Tensor]) -> None:
        """Give both copies of a tied embedding, at the ends of the pipeline, the sum of their gradients, in place."""
        ends = [gradients[name] for name in ("embed.weight", "head.weight") if name in gradients]
        if len(ends) == 2:
            ends[0] += ends[1]
            ends[1].copy_(ends[0])
        elif ends:
            other = self.rank_of[self.n_stages - 1 if 0 in self.stages else 0]
            sent, received = ends[0].contiguous(), torch.empty_like(ends[0], memory_format=torch.contiguous_format)
            for work in dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, sent, group=self.group, group_peer=other),
                    dist.P2POp(dist.irecv, received, group=self.group, group_peer=other),
                ]
            ):
                work.wait()
            ends[0] += received

    def _hidden(self, tokens_BT: Tensor) -> tuple[int, int, int]:
        rows, row_len = tokens_BT.shape
        return rows, row_len // (self.mesh.axes.tp if self.config.sequence_parallel else 1), self.d_model

    def _schedule(self, n_batches: int, tokens_BT: Tensor) -> Any:
        """Make the schedule of a number of micro-batches, once; a ramp-up has several."""
        key = (n_batches, tokens_BT.shape)
        if key not in self._schedules:
            hidden = torch.empty(self._hidden(tokens_BT), dtype=self.dtype, device="meta", requires_grad=True)
            stages = [
                Stage(
                    stage,
                    number,
                    self.n_stages,
                    self.mesh.device,
                    zero_stage=self.config.zero_stage,
                    input_args=hidden if number else tokens_BT.to("meta"),
                    output_args=hidden if number + 1 < self.n_stages else torch.empty((), device="meta"),
                    group=self.group,
                )
                for number, stage in self.stages.items()
            ]
            how: dict[str, Any] = {"n_microbatches": n_batches, "loss_fn": lambda loss, _: loss, "scale_grads": False}
            name = self.config.pipeline_schedule.value
            self._schedules[key] = (
                Schedule1F1B(stages[0], **how) if name == "1f1b" else SCHEDULES[name](stages, **how)  # type: ignore[arg-type]
            )
        return self._schedules[key]
