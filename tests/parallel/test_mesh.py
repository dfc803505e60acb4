"""Ranks that cannot join, or hang, end with a message that names them, and none is left."""

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


def start_rank(rank: int, world_size: int, port: int, init_timeout_s: float = 60) -> subprocess.Popen[str]:
    """Start a rank as torchrun would."""
    return start(
        str(init_timeout_s), "60", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size,
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
    )  # fmt: skip


def errors_of(process: subprocess.Popen[str]) -> list[str]:
    """Wait for a process to fail, and return its lines."""
    lines = process.communicate(timeout=200)[1].splitlines()
    assert process.returncode == 1, lines
    return lines


def test_port_in_use() -> None:
    """Case 37."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (line,) = errors_of(start_rank(0, 2, port))
    assert f"127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT)" in line


@pytest.mark.parametrize(("rank", "why"), [(0, "1/2 clients joined"), (1, "timed out")])
def test_rank_whose_peer_never_joins_gives_up(rank: int, why: str) -> None:
    """Case 37."""
    port = free_port()
    line = errors_of(start_rank(rank, 2, port, init_timeout_s=2))[-1]  # after torch's own stack
    for words in (f"RANK {rank}", "(WORLD_SIZE)", f"127.0.0.1:{port}", "(parallel.init_timeout_s)", why):
        assert words in line


def test_hanging_rank_ends_all() -> None:
    """Case 30."""
    parent = psutil.Process(os.getpid())
    others = set(parent.children(recursive=True))  # of other tests
    process = start("60", "2", "1")
    family: set[psutil.Process] = set()
    while process.poll() is None:
        family.update(set(parent.children(recursive=True)) - others)
        time.sleep(0.2)
    lines = errors_of(process)
    assert lines[0] == "error: rank 0 failed first"
    assert sum(line.startswith("Traceback") for line in lines) == 1
    assert len(family) >= 3 and not psutil.wait_procs(family, 5)[1]
