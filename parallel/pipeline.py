"""Pipeline parallelism: this rank's stages, run by the schedules of torch.distributed.pipelining.

Imported late, because it imports torch's compiler.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward_weight
from torch.distributed.pipelining.schedules import get_schedule_class

from model.config import ModelConfig
from model.transformer import Transformer
from parallel.axes import stages_of
from parallel.config import ParallelConfig
from parallel.mesh import Mesh
from parallel.parallelize import set_gradient_sync, sharded_modules
from parallel.tensor_parallel import local

SCHEDULES = {"interleaved_1f1b": "Interleaved1F1B", "zero_bubble": "InterleavedZeroBubble", "zbv": "ZBVZeroBubble"}
Inputs = tuple[Tensor, Mapping[str, Any]]  # a micro-batch: tokens_BT, and keyword arguments of every stage


class Hidden(nn.Module):
    """Hides an FSDP module from torch's stage, which would gather it whole and reduce its gradients at the end."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor, **kwargs: Any) -> Tensor:
        out = self.model(*args, **kwargs)
        return out.clone() if out._is_view() else out  # torch's split backward pass detaches it in place

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return the parameters that autograd knows: the gathered ones, even while their memory is freed."""
        sharded = sharded_modules(self.model)
        return chain.from_iterable(map(gathered, sharded)) if sharded else self.model.parameters(recurse)


class Stage(PipelineStage):
    """A stage that reduces gradients and frees parameters as the ZeRO stage has it, by FSDP's own hooks.

    Where a backward pass is split, for inputs and later for weights, the hooks see no gradients the first time and are
    not called the second, so what they do is done here, block by block as they would.
    """

    def __init__(self, model: Transformer, *args: Any, zero_stage: int, **kwargs: Any) -> None:
        super().__init__(Hidden(model), *args, **kwargs)
        self.model, self.zero_stage = model, zero_stage

    def backward_maybe_with_nosync(self, backward_type: Any, bwd_kwargs: dict, last_backward: bool = False) -> Any:
        if isinstance(self.model, FSDPModule):
            set_gradient_sync(self.model, self.zero_stage, last=last_backward)
            if backward_type == "weight":
                self._weight_gradients(self.model, bwd_kwargs["param_groups"])
                return (), None
        return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)

    def _weight_gradients(self, model: FSDPModule, param_groups: list[dict[str, Any]]) -> None:
        """Compute the gradients of weights, block by block, while the next block is gathered."""
        state = model._get_fsdp_state()
        # A weight's gradient may call a hook of FSDP's, which must not take the pass to end with it.
        state._state_ctx.post_backward_final_callback_queued = True
        root, *parts = sharded_modules(self.model)
        modules = [module for module in (root, *reversed(parts)) if gathered(module)]
        handles = (module.unshard(async_op=True) for module in modules)
        handle = next(handles)
        for module in modules:
            assert handle is not None
            handle.wait()
            handle = next(handles, None)
            params = gathered(module)
            nodes = {get_gradient_edge(param).node for param in params}
            stage_backward_weight(iter(params), [group for group in param_groups if nodes.issuperset(group["params"])])
            group = module._get_fsdp_state()._fsdp_param_group
            assert group is not None
            group.post_backward()  # reduces gradients and frees parameters, as FSDP does by itself
        # Private, like torch's own pipelining: nothing public ends a pass that autograd did not run.
        state._root_post_backward_final_callback()


def gathered(module: FSDPModule) -> list[nn.Parameter]:
    """Return a module's own parameters as autograd knows them; their memory may be freed."""
    group = module._get_fsdp_state()._fsdp_param_group
    return [] if group is None else [param.unsharded_param for param in group.fsdp_params]


class Pipeline:
    """Runs micro-batches through the stages of all ranks; `stages` are this rank's, first to last."""

    def __init__(self, stages: Sequence[Transformer], mesh: Mesh, config: ParallelConfig, model: ModelConfig) -> None:
        assert mesh.param_mesh is not None
        self.mesh, self.config, self.d_model, self.tied = mesh, config, model.d_model, model.tie_embeddings
        self.rank_of = {s: rank for rank in range(mesh.axes.pp) for s in stages_of(rank, mesh.axes.pp, config)}
        self.n_stages = len(self.rank_of)
        self.stages = dict(zip(stages_of(mesh.coordinate("pp"), mesh.axes.pp, config), stages, strict=True))
        self.group = mesh.param_mesh.get_group("pp")
        self.dtype = next(stages[0].parameters()).dtype
        self._schedules: dict[tuple[int, torch.Size], Any] = {}

    def train(self, inputs: Sequence[Inputs]) -> None:
        """Run the micro-batches of a step forward and backward."""
        schedule = self._schedule(len(inputs), inputs[0][0])
        args = [(tokens_BT,) if 0 in self.stages else () for tokens_BT, _ in inputs]
        # `step` would chunk one large batch evenly, but packs have different numbers of documents.
        schedule._split_inputs = lambda _args, _kwargs: (args, [dict(kwargs) for _, kwargs in inputs])
        schedule.step(target=torch.zeros(len(inputs)), losses=[], return_outputs=False)

    @torch.no_grad()
    def evaluate(self, tokens_BT: Tensor, kwargs: Mapping[str, Any]) -> None:
        """Run a micro-batch forward."""
        x = tokens_BT
        for number, stage in self.stages.items():
            if number and number - 1 not in self.stages:
                x = torch.empty(self._hidden_shape(tokens_BT), dtype=self.dtype, device=self.mesh.device)
                dist.recv(x, group=self.group, group_src=self.rank_of[number - 1])
            x = stage(x, **kwargs)
            if number + 1 < self.n_stages and number + 1 not in self.stages:
                dist.send(x.contiguous(), group=self.group, group_dst=self.rank_of[number + 1])

    def sum_tied(self, params: Mapping[str, nn.Parameter]) -> None:
        """Set the gradients of a tied embedding's copies, on the first and last stage, to their sum, in place."""
        grads: Any = [params[name].grad for name in ("embed.weight", "head.weight") if name in params]
        ends = [local(grad) for grad in grads]
        if len(ends) == 2:
            ends[0] += ends[1]
            ends[1].copy_(ends[0])
        elif ends:
            other = self.rank_of[self.n_stages - 1 if 0 in self.stages else 0]
            sent, received = ends[0].contiguous(), torch.empty_like(ends[0], memory_format=torch.contiguous_format)
            pairs = ((dist.isend, sent), (dist.irecv, received))
            ops = [dist.P2POp(op, tensor, group=self.group, group_peer=other) for op, tensor in pairs]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            ends[0] += received

    def _hidden_shape(self, tokens_BT: Tensor) -> tuple[int, int, int]:
        rows, row_len = tokens_BT.shape
        return rows, row_len // (self.mesh.axes.tp if self.config.sequence_parallel else 1), self.d_model

    def _schedule(self, n_batches: int, tokens_BT: Tensor) -> Any:
        """Return the schedule for a number of micro-batches, of which a ramp-up has several."""
        key = (n_batches, tokens_BT.shape)
        if key not in self._schedules:
            hidden = torch.empty(self._hidden_shape(tokens_BT), dtype=self.dtype, device="meta", requires_grad=True)
            first, last = tokens_BT.to("meta"), torch.empty((), device="meta")
            stages: Any = []
            for number, model in self.stages.items():
                shapes = (hidden if number else first, hidden if number + 1 < self.n_stages else last)
                place = (number, self.n_stages, self.mesh.device)
                stages.append(Stage(model, *place, *shapes, group=self.group, zero_stage=self.config.zero_stage))
            name = self.config.pipeline_schedule.value
            make: Any = get_schedule_class(SCHEDULES.get(name, name))
            settings = {"n_microbatches": n_batches, "loss_fn": lambda loss, _: loss, "scale_grads": False}
            self._schedules[key] = make(stages[0] if name == "1f1b" else stages, **settings)
        return self._schedules[key]
