"""A rank of `test_mesh.py`, or the parent of two: python -m tests.parallel.mesh_rank INIT_S STEP_S [HANGING_RANK]."""

import sys
import time

import torch

from conf.cli import report_user_errors
from launch.ranks import launch
from parallel.config import Device, ParallelConfig
from parallel.mesh import distributed


def meet(config: ParallelConfig, hangs: int | None) -> None:
    """Join the other ranks and sum a number over all."""
    with distributed(config) as mesh:
        if mesh.rank == hangs:
            time.sleep(600)
        assert float(mesh.sum_(torch.ones(1))) == mesh.world_size


if __name__ == "__main__":
    init_s, step_s, *hanging = sys.argv[1:]
    config = ParallelConfig(
        device=Device.cpu, dp_replicate=-1, nproc_per_node=2, init_timeout_s=float(init_s), step_timeout_s=float(step_s)
    )
    with report_user_errors():
        launch(meet, config, *map(int, hanging or ["-1"]), config=config)
