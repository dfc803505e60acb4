"""Pipeline parallelism: the stages of a rank, run by the schedules of torch.distributed.pipelining."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.config import ParallelConfig
from parallel.mesh import Mesh

# By torch's names: importing them brings in the whole compiler, which a run without a pipeline does not wait for.
SCHEDULES = {
    "1f1b": "Schedule1F1B",
    "interleaved_1f1b": "ScheduleInterleaved1F1B",
    "zero_bubble": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
}
# Tokens, and what every stage is told of a micro-batch
Inputs = tuple[Tensor, Mapping[str, Any]]


def stages_of(pp_rank: int, pp_size: int, config: ParallelConfig) -> list[int]:
    """Give the numbers of a rank's stages: rounds in the same direction, or there and back for zbv."""
    if config.pipeline_schedule.value == "zbv":
        return [pp_rank, 2 * pp_size - 1 - pp_rank]
    return [pp_rank + turn * pp_size for turn in range(config.virtual_stages)]


class Pipeline:
    """Runs micro-batches through the stages of all ranks; `stages` are this one's, first to last."""

    def __init__(self, stages: Sequence[nn.Module], mesh: Mesh, config: ParallelConfig, d_model: int) -> None:
        assert mesh.layout is not None
        self.mesh, self.config, self.d_model = mesh, config, d_model
        self.stages = dict(zip(stages_of(mesh.place("pp"), mesh.axes.pp, config), stages, strict=True))
        self.n_stages = mesh.axes.pp * config.virtual_stages
        self.rank_of = {s: rank for rank in range(mesh.axes.pp) for s in stages_of(rank, mesh.axes.pp, config)}
        self.group = mesh.layout.get_group("pp")
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

    def _hidden(self, tokens_BT: Tensor) -> tuple[int, int, int]:
        rows, row_len = tokens_BT.shape
        return rows, row_len // (self.mesh.axes.tp if self.config.sequence_parallel else 1), self.d_model

    def _schedule(self, n_batches: int, tokens_BT: Tensor) -> Any:
        """Make the schedule of a number of micro-batches, once; a ramp-up has several."""
        from torch.distributed import pipelining

        key = (n_batches, tokens_BT.shape)
        if key not in self._schedules:
            hidden = torch.empty(self._hidden(tokens_BT), dtype=self.dtype, device="meta", requires_grad=True)
            stages = [
                pipelining.PipelineStage(
                    stage,
                    number,
                    self.n_stages,
                    self.mesh.device,
                    input_args=hidden if number else tokens_BT.to("meta"),
                    output_args=hidden if number + 1 < self.n_stages else torch.empty((), device="meta"),
                    group=self.group,
                )
                for number, stage in self.stages.items()
            ]
            how: dict[str, Any] = {"n_microbatches": n_batches, "loss_fn": lambda loss, _: loss, "scale_grads": False}
            name = self.config.pipeline_schedule.value
            schedule = getattr(pipelining, SCHEDULES[name])
            self._schedules[key] = schedule(stages[0] if name == "1f1b" else stages, **how)
        return self._schedules[key]
