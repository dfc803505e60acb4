"""Ranks that cannot meet say so in a line, one that hangs is named; they exit with 1, and none is left."""

import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from launch.ranks import free_port
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


def start(*arguments: str, **variables: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.parallel.mesh_rank", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in variables.items()}}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def joined(rank: int, world_size: int, port: int, init_timeout_s: float = 60) -> subprocess.Popen[str]:
    """Start a rank as torchrun would."""
    return start(
        str(init_timeout_s), "60", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size,
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
    )  # fmt: skip


def told(process: subprocess.Popen[str]) -> list[str]:
    """Wait for a rank that is to fail, and give its lines."""
    lines = process.communicate(timeout=200)[1].splitlines()
    assert process.returncode == 1, lines
    return lines


def test_ranks_that_all_join_add_up() -> None:
    port = free_port()
    ranks = [joined(rank, 2, port) for rank in range(2)]
    assert [(rank.communicate(timeout=200)[1], rank.returncode) for rank in ranks] == [("", 0), ("", 0)]


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (line,) = told(joined(0, 2, port))
    assert line.startswith(f"error: MASTER_PORT ({port}) is in use on ") and line.endswith("; export another one")


@pytest.mark.parametrize(
    ("rank", "why"), [(0, "1/2 clients joined."), (1, "RANK 0 does not listen there (Connection refused)")]
)
def test_a_rank_whose_peer_never_joins_gives_up(rank: int, why: str) -> None:
    port = free_port()
    (line,) = told(joined(rank, 2, port, init_timeout_s=2))
    assert line.startswith(
        f"error: the 2 processes (WORLD_SIZE) did not all join at 127.0.0.1:{port} within 2 s "
        f"(parallel.init_timeout_s); RANK {rank} waited: "
    )
    assert line.endswith(why)


def test_ranks_that_count_themselves_differently_are_told() -> None:
    port = free_port()
    ranks = [joined(0, 2, port), joined(1, 3, port)]
    for rank, (line,) in enumerate([told(process) for process in ranks]):
        mine, others = 2 + rank, 3 - rank
        assert line == (
            f"error: WORLD_SIZE ({mine}) of RANK {rank} must be that of every rank, and RANK {1 - rank} has {others}; "
            "start all of them with the same"
        )


def test_a_rank_that_hangs_in_a_step_is_named_with_where_it_stood() -> None:
    parent = psutil.Process(os.getpid())
    others = set(parent.children(recursive=True))  # of other tests
    process = start("60", "2", "1")
    family: set[psutil.Process] = set()
    while process.poll() is None:
        family.update(set(parent.children(recursive=True)) - others)
        time.sleep(0.2)
    lines = told(process)
    assert lines[0] == "error: rank 0 failed first"
    stack = lines[lines.index("rank 1 hung at") :]
    assert any("in meet" in line for line in stack)
    assert sum(line.startswith("Traceback") for line in lines) == 1
    assert len(family) >= 3 and not psutil.wait_procs(family, 5)[1]
