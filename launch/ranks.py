"""The ranks of a run: spawned on this machine, or started by torchrun or srun. Imports no torch."""

import ctypes
import errno
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from launch.config import RankError, is_user_error
from launch.environment import VARIABLES, free_port, joined_variables, nproc_per_node, set_library_defaults
from parallel.config import ParallelConfig
from tracking.logs import STACK_SIGNALS
from training.config import SaveError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
GRACE_S = 15.0  # for the other ranks to exit after a failure, one of them once it has sent an alert
POLL_S = 0.5


def launch(work: Callable[..., Any], *args: Any, config: ParallelConfig) -> Any:
    """Run `work(*args)` on every rank; return rank 0's result, or this rank's under torchrun or srun.

    Function and arguments are pickled for spawned ranks. A user error of the first rank that fails is raised again,
    any other exception as a `RankError` with the rank's traceback.
    """
    set_library_defaults()
    for signum in STACK_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)  # until the log for stacks is open
    joined = joined_variables(config)
    os.environ.update(joined)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: save and stop when torchrun dies
        work = record(work)  # torchrun then prints the traceback of the first failure
    n_ranks = 1 if joined else nproc_per_node(config)
    if n_ranks == 1:
        return work(*args)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        return _Ranks(n_ranks, Path(folder)).run(work, args)


def handle(signals: Iterable[int], handler: Callable[[int, FrameType | None], object]) -> dict[int, Any]:
    """Install a signal handler and return the old ones; SIGHUP stays ignored under nohup."""
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    return {signum: signal.signal(signum, handler) for signum in set(signals) - ignored}


@dataclass
class RankEnd:
    """The outcome of a rank: a value, an exit code, or a failure described by `text`."""

    value: Any = None
    exit_code: Any = None
    error: BaseException | None = None  # a user error
    text: str = ""
    time: float = field(default_factory=time.time)

    @classmethod
    def of(cls, work: Callable[..., Any], *args: Any) -> "RankEnd":
        try:
            return cls(value=work(*args))
        except SystemExit as stop:
            return cls(exit_code=stop.code)
        except BaseException as error:
            if is_user_error(error):
                return cls(error=error, text=str(error) or repr(error))
            return cls(text=str(error) if isinstance(error, RankError) else traceback.format_exc())

    @property
    def is_crash(self) -> bool:
        """Whether a retry may succeed: after any failure but a user error, except a full disk."""
        full = isinstance(self.error, SaveError) or getattr(self.error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        return bool(self.text) and (self.error is None or full)

    def write(self, end_file: Path) -> None:
        partial = end_file.with_suffix(".partial")
        partial.write_bytes(pickle.dumps(self))
        partial.rename(end_file)


def read_ends(end_files: Mapping[int, Path]) -> dict[int, RankEnd]:
    """Return the outcomes of ranks, without those that were killed or still run."""
    return {rank: pickle.loads(path.read_bytes()) for rank, path in end_files.items() if path.exists()}


def first_failure(ends: Mapping[int, RankEnd]) -> int | None:
    failed = [rank for rank, end in ends.items() if end.text]
    return min(failed, key=lambda rank: ends[rank].time, default=None)


def describe_failure(rank: int, text: str) -> str:
    """Return a failure with its rank, unless the text already names one."""
    return text if text.startswith("error: ") else f"error: rank {rank} failed first\n{text}"


class _Ranks:
    """Spawned ranks, which receive the parent's signals, die with it, and fail together."""

    def __init__(self, n_ranks: int, folder: Path) -> None:
        self.end_files = {rank: folder / f"rank{rank}" for rank in range(n_ranks)}
        self.processes: list[BaseProcess] = []
        self.signum: int | None = None

    def run(self, work: Callable[..., Any], args: tuple) -> Any:
        """Spawn the ranks and wait until all have exited, or until `GRACE_S` after a failure."""
        before = handle(SIGNALS, self._forward)
        context, port, n_ranks = multiprocessing.get_context("spawn"), free_port(), len(self.end_files)
        try:
            for rank, end_file in self.end_files.items():
                values = (rank, n_ranks, rank, n_ranks, "127.0.0.1", port)
                variables = dict(zip(VARIABLES, map(str, values), strict=True))
                process = context.Process(target=_run_rank, args=(os.getpid(), variables, end_file, work, args))
                process.start()
                self.processes.append(process)
            before |= handle(STACK_SIGNALS, self._forward)  # last: spawned processes inherit that they are ignored
            deadline = None
            while running := [rank for rank, process in enumerate(self.processes) if process.exitcode is None]:
                if deadline is None and self._has_a_failure():
                    deadline = time.monotonic() + GRACE_S
                if deadline is not None and time.monotonic() > deadline:
                    break
                wait([self.processes[rank].sentinel for rank in running], POLL_S)
            return self._result(hung={rank for rank in running if not self.end_files[rank].exists()})
        finally:
            for process in self.processes:
                process.kill()
                process.join()
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _forward(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = signum if signum in SIGNALS else self.signum
        for process in self.processes:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, signum)

    def _has_a_failure(self) -> bool:
        exited = {rank for rank, process in enumerate(self.processes) if process.exitcode is not None}
        ends = read_ends(self.end_files)  # read last: a rank writes its end before it exits
        return first_failure(ends) is not None or not exited <= ends.keys()

    def _result(self, hung: set[int]) -> Any:
        ends = read_ends(self.end_files)
        killed = [rank for rank in self.end_files if rank not in ends and rank not in hung]
        first = first_failure(ends)
        if self.signum is not None and (killed or first is not None) and not hung:
            sys.exit(128 + self.signum)  # stopped before there was anything to save
        if killed:
            code = self.processes[killed[0]].exitcode or 0
            death = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            memory = "; the system may have run out of memory" if -code == signal.SIGKILL else ""
            raise RankError(f"error: rank {killed[0]} died first: {death}{memory}")
        if first is not None:
            raise ends[first].error or RankError(describe_failure(first, ends[first].text))
        for end in ends.values():
            if end.exit_code is not None:
                sys.exit(end.exit_code)
        return ends[0].value


def _run_rank(parent: int, variables: dict[str, str], end_file: Path, work: Callable[..., Any], args: tuple) -> None:
    """Run a spawned rank, which dies with its parent."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        return
    os.setpgrp()  # Ctrl-C reaches only the parent, which forwards it
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.update(variables)
    RankEnd.of(work, *args).write(end_file)
