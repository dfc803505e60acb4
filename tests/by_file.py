"""Distribution of tests by pytest-xdist: a worker takes whole files, so fixtures are made once, the longest first."""

import torch
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

# About a minute or more each: started last, one of them would keep a single worker busy at the end.
LONGEST = (
    "tests/test_soak.py", "tests/parallel/test_layouts.py", "tests/slurm", "tests/test_resume.py", "tests/test_train.py",
    "tests/dry_run/test_dry_run.py", "tests/test_benchmarks.py", "tests/launch/test_sweep.py", "tests/test_demo.py",
    "tests/test_export.py", "tests/test_hangs.py",
)  # fmt: skip


class ByFile(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        if torch.cuda.is_available():
            return "tests"  # workers would share the GPU: one takes all
        return "tests/slurm" if file.startswith("tests/slurm/") else file  # one set of ports and nodes

    def _assign_work_unit(self, node: WorkerController) -> None:
        longest = min(self.workqueue, key=lambda file: LONGEST.index(file) if file in LONGEST else len(LONGEST))
        self.workqueue.move_to_end(longest, last=False)
        super()._assign_work_unit(node)
