"""One rank of `test_resume.py`: it trains on each layout, and goes on with the pairs' checkpoints on the other one."""

import os
import shutil
import time
from pathlib import Path
from unittest import mock

from tests.conftest import trained
from training.checkpoint import Checkpoint, Checkpoints
from training.config import CheckpointConfig
from training.resume import RunCheckpoints

WORLD_SIZE = 4
# Each end of a pipeline has a copy of a tied embedding; Muon's matrices are updated whole by one owner.
MUON = ["model.tie_embeddings=true", "optimizer=muon", "optimizer.normuon=true", "optimizer.lr=1e-3"]
LAYOUTS = {
    "single": ["parallel=single"],
    "hybrid": ["parallel=hybrid_zero", "parallel.dp_shard=2"],
    "zero3": ["parallel=zero3"],
    "3d": ["parallel=3d"],  # two stages of two tensor-parallel ranks
    "muon_zero1": ["parallel=zero1", *MUON],
    "muon_3d": ["parallel=3d", *MUON],
}
# Every layout is left once and entered once; names and shapes of a checkpoint do not depend on where it comes from.
PAIRS = [
    ("single", "hybrid"), ("hybrid", "zero3"), ("zero3", "3d"), ("3d", "single"), ("hybrid", "hybrid"),
    ("muon_zero1", "muon_3d"), ("muon_3d", "muon_zero1"), ("muon_zero1", "muon_zero1"),
]  # fmt: skip
SAVED, STEPS = 2, 4


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
    self.checkpoints, self.saved_step = Checkpoints(again, CheckpointConfig(keep=0), checkpoint.ranks.group), 0
    self.save()
    self.checkpoints = run


RESTORE = RunCheckpoints.restore


@mock.patch("torch.set_num_threads", lambda _: None)
def main(rank: int, folder: Path, overrides: list[str], environment: dict[str, str]) -> None:
    os.environ |= {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    stop = folder / "stop"
    for layout in LAYOUTS:
        run(folder / layout, layout, [*overrides, f"checkpoint.stop_file={stop}"])
        (folder / f"{layout}.{rank}").touch()
    for layout in ("hybrid", "muon_zero1"):
        run(folder / f"{layout}_whole", layout, overrides)
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
