"""Two workers of pytest-xdist share the tests out, but not what there is once."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.conftest import ROOT, pytest_xdist_make_scheduler

pytest.importorskip("xdist")

READ = ["tests/corpus/test_read.py::first", "tests/corpus/test_read.py::second", "tests/corpus/test_read.py::third"]
LAYOUTS = ["tests/parallel/test_layouts.py::all[a-b]"]
SLURM = ["tests/slurm/test_prepare.py::one", "tests/slurm/test_slurm.py::two", "tests/slurm/test_slurm.py::three"]


def begun() -> list[list[str]]:
    """What each of two workers is to begin with."""
    from xdist.remote import Producer

    tests = [*READ, *LAYOUTS, *SLURM]
    config: Any = SimpleNamespace(
        getvalue=lambda name: ["2*popen"] if name == "tx" else None, option=SimpleNamespace(loadscopereorder=True)
    )
    scheduler = pytest_xdist_make_scheduler(config, Producer("", enabled=False))
    workers: list[Any] = [mock.Mock(shutting_down=False) for _ in range(2)]
    for worker in workers:
        scheduler.add_node(worker)
        scheduler.add_node_collection(worker, tests)
    scheduler.schedule()
    return [[tests[i] for call in worker.send_runtest_some.call_args_list for i in call.args[0]] for worker in workers]


def test_a_worker_takes_whole_files_the_longest_first_and_one_has_all_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert begun() == [[*LAYOUTS, *READ], SLURM], "with fewer than three tests left, a worker is given its next file"


def test_the_files_to_begin_with_are_there() -> None:
    from tests.by_file import LONGEST

    assert all((ROOT / file).exists() for file in LONGEST)


def test_one_worker_has_everything_where_there_is_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sorted(begun()) == [[], [*READ, *LAYOUTS, *SLURM]]
