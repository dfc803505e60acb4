"""A rank of `test_mesh.py`, or the parent of two: python -m tests.parallel.mesh_rank INIT_S STEP_S [RANK_THAT_HANGS]."""

import sys
import time

import torch

from conf.command import is_sentence, sentences
from parallel.config import Device, ParallelConfig
from parallel.launch import launch
from parallel.mesh import distributed


def meet(config: ParallelConfig, hangs: int | None) -> None:
    """Join the others and add a number up with them."""
    with distributed(config) as mesh:
        if mesh.rank == hangs:
            time.sleep(600)
        assert float(mesh.sum_(torch.ones(1))) == mesh.world_size


if __name__ == "__main__":
    init_s, step_s, *hanging = sys.argv[1:]
    config = ParallelConfig(
        device=Device.cpu,
        dp_replicate=-1,
        local_processes=2,
        init_timeout_s=float(init_s),
        step_timeout_s=float(step_s),
    )
    with sentences():
        launch(meet, config, *map(int, hanging or ["-1"]), config=config, says_enough=is_sentence)
