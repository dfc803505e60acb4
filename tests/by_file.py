"""How pytest-xdist shares tests out: a worker takes whole files, whose fixtures are made once, the longest first."""

import torch
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

# Of a minute and more, or nearly: the other worker would wait for one of them that was begun last.
LONGEST = (
    "tests/parallel/test_layouts.py", "tests/slurm", "tests/test_resume.py", "tests/test_train.py",
    "tests/dry_run/test_dry_run.py", "tests/launch/test_sweep.py", "tests/test_export.py",
)  # fmt: skip


class ByFile(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        if torch.cuda.is_available():
            return "tests"  # workers would share the card: one has all
        return "tests/slurm" if file.startswith("tests/slurm/") else file  # there are its ports and nodes once

    def _assign_work_unit(self, node: WorkerController) -> None:
        longest = min(self.workqueue, key=lambda file: LONGEST.index(file) if file in LONGEST else len(LONGEST))
        self.workqueue.move_to_end(longest, last=False)
        super()._assign_work_unit(node)
