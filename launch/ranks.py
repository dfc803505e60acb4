"""The processes of a run: started on this machine, or joined when something else started them.

Every rank of several has RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its
environment; a run of one process has none of them. Nothing here imports torch: a parent only waits.
"""

import ctypes
import faulthandler
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from launch.config import LauncherConfig, RankError
from parallel.config import AXES, Device, ParallelConfig, ParallelError, no_fp8, no_graphs

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PORTS = range(20000, 32000)  # below the ports that systems hand out by themselves
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
LAST_WORDS_S = 5.0  # that the other ranks have to end by themselves once one has failed
KILL_S = 1.0  # between asking a silent rank for its stack and killing it


def launch(
    work: Callable[..., Any], *args: Any, config: ParallelConfig, is_user_error: Callable[[BaseException], bool]
) -> Any:
    """Run `work(*args)` on every rank of a run and give what rank 0, or the joined rank, returns.

    All are pickled for started ranks. The exception of the rank that failed first is raised here as it
    is if it `is_user_error`, and otherwise as a `RankError` with that rank's own traceback.
    """
    joined = joined_environment(os.environ)
    if joined:
        check_joined(joined, config)
        _check_port(joined)
        faulthandler.register(signal.SIGQUIT, sys.__stderr__ or sys.stderr)
        with having(joined):
            return work(*args)
    n_ranks = nproc_per_node(config)
    return work(*args) if n_ranks == 1 else _Ranks(n_ranks).wait(work, args, is_user_error)


def nproc_per_node(config: ParallelConfig, launcher: LauncherConfig | None = None) -> int:
    """Give the number of ranks that a plain `python train.py` runs here: what was asked for, what the axes make, or,
    if one of these is to be filled, one a GPU. A `launcher` leaves a job of a sweep a share of the GPUs."""
    n_gpus = 0 if config.device is Device.cpu else visible_gpus()
    n_gpus = n_gpus if launcher is None else launcher.gpus_of_a_job(n_gpus)
    asked = config.nproc_per_node
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fewest = max(1, math.prod(size for size in sizes.values() if size != -1))
    n_ranks = asked or (n_gpus if n_gpus and -1 in sizes.values() else fewest)
    if n_gpus and n_ranks > n_gpus:
        named = " x ".join(f"parallel.{axis} ({size})" for axis, size in sizes.items() if size > 1)
        shared = launcher is not None and launcher.parallel_jobs != 1
        of = "a job's share (launcher.parallel_jobs) of the GPUs here" if shared else "the number of GPUs here"
        raise ParallelError(
            f"{f'parallel.nproc_per_node ({asked})' if asked else named} must be at most {of} ({n_gpus}); "
            "start fewer, or pass parallel.device=cpu"
        )
    return n_ranks


def visible_gpus() -> int:
    """Count the GPUs that this process may use, by the driver and without importing torch."""
    from importlib.metadata import version

    if os.environ.get("CUDA_VISIBLE_DEVICES", "-") in ("", "-1") or "+cpu" in version("torch"):
        return 0
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def refuse_no_gpu(config: ParallelConfig, fp8: str | None) -> None:
    """Raise `ParallelError` if a machine without a GPU is asked for what needs one; `fp8` is its scaling, if any."""
    if config.device is Device.cpu or not visible_gpus():
        if fp8 is not None:
            raise no_fp8(fp8, "cpu")
        if config.cuda_graphs:
            raise no_graphs("cpu")


def joined_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Give a rank's variables from whatever started it: torchrun or its like, srun, or nothing ({})."""
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return {name: environment[name] for name in VARIABLES if name in environment}
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return _slurm_variables(environment)
    return {}


def _slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Translate the variables of a task of srun.

    A task that sees one GPU alone has it at index 0, whatever its number on the node.
    """
    step = ".".join(environment.get(f"SLURM_{name}", "") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    tasks: list[str] = []  # of each node, as in 2(x3),1
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        n_tasks, _, times = part.partition("(x")
        tasks += [n_tasks] * int(times.rstrip(")") or 1)
    alone = environment.get("CUDA_VISIBLE_DEVICES", "").isdigit()
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": "0" if alone else environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": tasks[int(environment["SLURM_NODEID"])],
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(random.Random(step).choice(PORTS)),
    }


def first_host(node_list: str) -> str:
    """Give the first host of Slurm's short form: n03 of n[03-07,9],m1."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", node_list)
    if not found:
        raise ParallelError(f"SLURM_STEP_NODELIST ({node_list}) names no host")
    return "".join(part or "" for part in found.groups())


def check_joined(variables: dict[str, str], config: ParallelConfig) -> None:
    """Refuse what cannot become a rank; raises `ParallelError` with one sentence."""
    missing = [name for name in VARIABLES if name not in variables]
    if missing == list(VARIABLES[2:]) and variables == {"RANK": "0", "WORLD_SIZE": "1"}:
        return
    if missing:
        raise ParallelError(
            f"{', '.join(missing)} must be set beside {', '.join(variables)}; torchrun and srun set all of them, "
            "and python train.py alone needs none"
        )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if not variables[name].isdigit():
            raise ParallelError(f"{name} ({variables[name]}) must be a number of 0 or more")
    rank, world_size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
    local_rank, local_size = (int(variables[n]) for n in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if rank >= world_size:
        raise ParallelError(f"RANK ({rank}) must be below WORLD_SIZE ({world_size})")
    if local_rank >= local_size or local_size > world_size:
        raise ParallelError(
            f"LOCAL_RANK ({local_rank}) must be below LOCAL_WORLD_SIZE ({local_size}), and that at most "
            f"WORLD_SIZE ({world_size})"
        )
    n_gpus = 0 if config.device is Device.cpu else visible_gpus()
    if n_gpus and local_rank >= n_gpus:
        raise ParallelError(
            f"LOCAL_WORLD_SIZE ({local_size}) ranks were started on a machine with {n_gpus} GPUs; "
            "start fewer, or pass parallel.device=cpu"
        )


def _check_port(variables: dict[str, str]) -> None:
    """Refuse a port on which something else listens."""
    if variables.get("RANK") != "0" or "MASTER_PORT" not in variables:
        return
    port = int(variables["MASTER_PORT"])
    kept_open = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own, for its ranks
    if not kept_open and not _is_free(port):
        raise ParallelError(f"MASTER_PORT ({port}) is in use on {socket.gethostname()}; export another one")


def free_port() -> int:
    """Give a port for ranks to meet on: one that the system hands to nobody before they do."""
    return next(port for port in random.sample(PORTS, len(PORTS)) if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


@contextmanager
def having(variables: dict[str, str]) -> Iterator[None]:
    """Have these variables in the environment for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class _Ranks:
    """Ranks on this machine: they get this process's signals, end with it, and fail as one."""

    def __init__(self, n_ranks: int) -> None:
        self.n_ranks = n_ranks
        self.processes: list[BaseProcess] = []
        self.pipes: list[Connection] = []
        self.told: dict[int, tuple] = {}  # by rank: ("value", it), ("exit", code) or ("error", time, exception, trace)
        self.silent: list[int] = []
        self.signum: int | None = None

    def wait(self, *work: Any) -> Any:
        """Start the ranks and wait for all; raises what the rank that failed first raised."""
        before = {signum: signal.signal(signum, self._forward) for signum in SIGNALS}
        try:
            with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
                self._start(Path(folder), work)
                if not self._all_end(until=None):
                    self._end_the_rest()
                return self._outcome(Path(folder))
        finally:
            for process in self.processes:
                process.kill()
                process.join()
            for pipe in self.pipes:
                pipe.close()
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _start(self, folder: Path, work: tuple) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        for rank in range(self.n_ranks):
            ours, theirs = context.Pipe(duplex=False)
            values = (rank, self.n_ranks, rank, self.n_ranks, "127.0.0.1", port)
            variables = dict(zip(VARIABLES, map(str, values), strict=True))
            arguments = (os.getpid(), variables, folder / f"rank{rank}", theirs, *work)
            process = context.Process(target=_run_rank, args=arguments, name=f"rank {rank}")
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def _forward(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = signum
        for process in self.processes:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, signum)

    def _all_end(self, until: float | None) -> bool:
        """Wait until all ranks have ended well; false as soon as one did not, or when the time is over."""
        while True:
            running = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
            for rank, pipe in enumerate(self.pipes):
                if rank not in self.told and pipe.poll():
                    try:
                        self.told[rank] = pipe.recv()
                    except EOFError:
                        continue
            if until is None and any(self._failed(rank) for rank in range(self.n_ranks)):
                return False
            if not running:
                return True
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                return False
            pipes = [self.pipes[rank] for rank in running if rank not in self.told]
            wait([*pipes, *(self.processes[rank].sentinel for rank in running)], left)

    def _failed(self, rank: int) -> bool:
        if rank in self.told:
            return self.told[rank][0] == "error"
        return self.processes[rank].exitcode is not None

    def _end_the_rest(self) -> None:
        """Leave the others some time for last words, ask the silent ones where they stand, and end them."""
        if self._all_end(until=time.monotonic() + LAST_WORDS_S):
            return
        self.silent = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        for rank in self.silent:
            os.kill(self.processes[rank].pid or 0, signal.SIGQUIT)
        time.sleep(KILL_S)

    def _outcome(self, folder: Path) -> Any:
        killed = [r for r, p in enumerate(self.processes) if r not in self.told and r not in self.silent]
        errors = sorted((told[1], rank) for rank, told in self.told.items() if told[0] == "error")
        if self.signum is not None and (killed or errors) and not self.silent:
            sys.exit(128 + self.signum)  # asked to end before there was anything to save
        if killed:
            code = self.processes[killed[0]].exitcode or 0
            raise RankError(f"error: rank {killed[0]} died first: {_death(code)}")
        if errors:
            _, first = errors[0]
            _, _, error, trace = self.told[first]
            if error is not None:
                raise error
            raise RankError(f"error: rank {first} failed first\n{trace}{self._stacks(folder, trace)}")
        for kind, value in self.told.values():
            if kind == "exit":
                sys.exit(value)
        return self.told[0][1]

    def _stacks(self, folder: Path, trace: str) -> str:
        """Where the ranks stood that others waited for in vain."""
        if not says_timeout(trace):
            return ""
        stacks = [(rank, (folder / f"rank{rank}").read_text()) for rank in self.silent]
        return "".join(f"\nrank {rank} hung; it stood at\n{stack}" for rank, stack in stacks)


def says_timeout(trace: str) -> bool:
    """Say whether an error is that of a rank which waited in vain for another."""
    return re.search(r"timed?[ _-]?out", trace, re.IGNORECASE) is not None


def _death(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    remedy = "; the system may have run out of memory" if -code == signal.SIGKILL else ""
    return f"{signal.Signals(-code).name}{remedy}"


def _run_rank(
    parent: int,
    variables: dict[str, str],
    stack: Path,
    pipe: Connection,
    work: Callable[..., Any],
    args: tuple,
    is_user_error: Callable[[BaseException], bool],
) -> None:
    """Be one rank: end with the parent, show the stack when asked, and tell how it went."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        return
    os.setpgrp()  # a terminal's Ctrl-C reaches the parent, which hands it on once
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    os.environ.update(variables)
    with stack.open("w") as file:
        faulthandler.register(signal.SIGQUIT, file)
        try:
            told = ("value", work(*args))
        except SystemExit as error:
            told = ("exit", error.code)
        except BaseException as error:
            trace = traceback.format_exc()
            told = ("error", time.time(), error if is_user_error(error) else None, trace)
        pipe.send(told)
        faulthandler.unregister(signal.SIGQUIT)
