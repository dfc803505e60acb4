"""Pipeline parallelism with the schedules of torch.distributed.pipelining.

Imported late, because it imports torch's compiler.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleInterleaved1F1B

from model.transformer import Transformer
from parallel.axes import stages_of
from parallel.parallelize import ParallelModel
from parallel.shards import ParamShard
from parallel.zero import Zero

Inputs = tuple[Tensor, Mapping[str, Any]]  # a micro-batch: tokens_BT, and keyword arguments of every stage


class Stage(PipelineStage):
    """A stage with ZeRO's gradient reduction."""

    def __init__(self, model: Transformer, *args: Any, zero: Zero | None, turn: int, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.zero, self.turn, self.begun = zero, turn, False

    def backward_maybe_with_nosync(self, backward_type: Any, bwd_kwargs: dict, last_backward: bool = False) -> Any:
        if self.zero is not None:
            self.zero.begin_backward(self.turn, first=not self.begun, last=last_backward)
            self.begun = not last_backward
        found = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        if self.zero is not None:
            self.zero.end_backward()
        return found


class Pipeline:
    """Runs micro-batches through the stages of all ranks; `stages` are this rank's, first to last."""

    def __init__(self, model: ParallelModel) -> None:
        mesh, config = model.mesh, model.layout
        assert mesh.param_mesh is not None
        self.mesh, self.config, self.zero = mesh, config, model.zero
        self.d_model, self.tied = model.module.config.d_model, model.module.config.tie_embeddings
        self.rank_of = {s: rank for rank in range(mesh.axes.pp) for s in stages_of(rank, mesh.axes.pp, config)}
        self.n_stages = len(self.rank_of)
        self.stages = dict(zip(stages_of(mesh.coordinate("pp"), mesh.axes.pp, config), model.stages, strict=True))
        self.group = mesh.param_mesh.get_group("pp")
        self.dtype = next(model.module.parameters()).dtype
        self._schedules: dict[tuple[int, torch.Size], Any] = {}

    def train(self, inputs: Sequence[Inputs]) -> None:
        """Run the micro-batches of a step forward and backward."""
        schedule = self._schedule(len(inputs), inputs[0][0])
        args = [(tokens_BT,) if 0 in self.stages else () for tokens_BT, _ in inputs]
        # `step` would split one large batch evenly, but `cu_seqlens` differ in length.
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

    def sum_tied(self, params: Mapping[str, ParamShard]) -> None:
        """Sum the gradients of a tied embedding's copies on the first and last stage, in place."""
        ends: Any = [params[name].grad for name in ("embed.weight", "head.weight") if name in params]
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
        """Return the schedule for a number of micro-batches, which changes during a ramp-up."""
        key = (n_batches, tokens_BT.shape)
        if key not in self._schedules:
            hidden = torch.empty(self._hidden_shape(tokens_BT), dtype=self.dtype, device="meta", requires_grad=True)
            first, last = tokens_BT.to("meta"), torch.empty((), device="meta")
            stages: Any = []
            for turn, (number, model) in enumerate(self.stages.items()):
                shapes = (hidden if number else first, hidden if number + 1 < self.n_stages else last)
                place = (number, self.n_stages, self.mesh.device)
                stages.append(Stage(model, *place, *shapes, group=self.group, zero=self.zero, turn=turn))
            settings: Any = {"n_microbatches": n_batches, "loss_fn": lambda loss, _: loss, "scale_grads": False}
            interleaved = self.config.pipeline_schedule.value == "interleaved_1f1b"
            self._schedules[key] = (
                ScheduleInterleaved1F1B(stages, **settings) if interleaved else Schedule1F1B(stages[0], **settings)
            )
        return self._schedules[key]
