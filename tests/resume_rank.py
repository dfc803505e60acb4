"""One rank of `test_resume.py`: python -m tests.resume_rank FOLDER OVERRIDES...

Trains three steps on each layout, and goes on with each of the pairs' checkpoints on the other layout.
"""

import os
import shutil
import sys
import time
from pathlib import Path
from unittest import mock

import torch

from tests.conftest import trained
from training.checkpoint import Checkpoint, Checkpoints
from training.resume import RunCheckpoints

WORLD_SIZE = 4
TIED = "model.tie_embeddings=true"
MUON = ["optimizer=muon", "optimizer.normuon=true", "optimizer.lr=1e-3"]
LAYOUTS = {
    "single": ["parallel=single"],
    "ddp": ["parallel=ddp"],
    "zero1": ["parallel=zero1"],
    "hybrid": ["parallel=hybrid_zero", "parallel.dp_shard=2"],
    "zero3": ["parallel=zero3"],
    "tp": ["parallel=tp_zero1"],
    "cp": ["parallel=cp"],
    "3d": ["parallel=3d"],  # two stages of two tensor-parallel ranks
    # Each end of a pipeline has a copy of the embedding.
    "tied_zero1": ["parallel=zero1", TIED],
    "tied_3d": ["parallel=3d", TIED],
    "tied_pp_zero1": ["parallel=zero1", "parallel.pp=2", TIED],
    "muon_zero1": ["parallel=zero1", *MUON],
    "muon_3d": ["parallel=3d", *MUON],
}
PAIRS = [
    ("single", "zero1"), ("zero1", "hybrid"), ("hybrid", "zero3"), ("zero3", "ddp"), ("ddp", "single"),
    ("zero1", "zero1"), ("single", "tp"), ("tp", "cp"), ("cp", "3d"), ("3d", "zero3"), ("3d", "single"),
    ("tied_zero1", "tied_3d"), ("tied_3d", "tied_pp_zero1"), ("tied_pp_zero1", "tied_zero1"),
    ("muon_zero1", "muon_3d"), ("muon_3d", "muon_zero1"),
]  # fmt: skip
SAVED, STEPS = 3, 5


def run(folder: Path, layout: str, overrides: list[str]) -> None:
    """Train in a folder on a layout; on one process it is rank 0 alone."""
    rank, size = int(os.environ["RANK"]), 1 if layout == "single" else WORLD_SIZE
    if rank < size:
        with mock.patch.dict(os.environ, {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}):
            trained(folder, *overrides, *LAYOUTS[layout], f"steps={STEPS}", "data.micro_batch_size=1")


def saving_again(self: RunCheckpoints, checkpoint: Checkpoint) -> None:
    """Restore, and at once save what was restored, beside the run."""
    RESTORE(self, checkpoint)
    run, again = self.checkpoints, checkpoint.path.parent.parent / "again"
    self.checkpoints, self.saved_step = Checkpoints(again, keep=0, group=checkpoint.ranks.group), 0
    self.save()
    self.checkpoints = run


RESTORE = RunCheckpoints.restore


def main() -> None:
    folder, overrides = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    stop = folder / "stop"
    for layout in LAYOUTS:
        run(folder / layout, layout, [*overrides, f"checkpoint.stop_file={stop}"])
        (folder / f"{layout}.{rank}").touch()
    run(folder / "zero1_whole", "zero1", overrides)
    RunCheckpoints.restore = saving_again  # type: ignore[method-assign]
    for before, after in PAIRS:
        target = folder / f"{before}_{after}"
        if rank == 0:
            wait(folder, before)
            shutil.copytree(folder / before, target)
            (folder / f"{target.name}.copied").touch()
        while not (folder / f"{target.name}.copied").exists():
            time.sleep(0.01)
        run(target, after, overrides)


def wait(folder: Path, layout: str) -> None:
    """Until every rank has left a run."""
    while len(list(folder.glob(f"{layout}.[0-9]"))) < WORLD_SIZE:
        time.sleep(0.01)


if __name__ == "__main__":
    main()
