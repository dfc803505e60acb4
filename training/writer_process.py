"""A process that writes a rank's checkpoint files: a thread of the trainer would slow down steps by Python's lock.

It shares a block of memory with the trainer, and ends when the trainer does, because its input does.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent


def direct(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in this process."""
    return function(*args)


class WriterProcess:
    """Calls functions in a process of its own; tensors in `block` are passed without a copy."""

    def __init__(self, n_bytes: int) -> None:
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("checkpoint")  # not in /dev/shm, which is small in a container
        else:
            fd, path = tempfile.mkstemp()
            os.unlink(path)
        os.truncate(fd, max(n_bytes, 1))
        self.fd, self.block = fd, _map(fd, n_bytes)
        weakref.finalize(self, os.close, fd)
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", f"from {__name__} import serve; serve()", str(self.fd), str(len(self.block))]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
        # In a session of its own, it is not stopped by a Ctrl-C that the trainer answers with a last save.
        self.process: Any = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[self.fd], env=environment,
            start_new_session=True,
        )  # fmt: skip

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(*args)`, or raise its exception; not for several threads."""
        if self.process.poll() is not None:
            self.close()
            self.start()
        try:
            _Pickler(self.process.stdin, self.block).dump((function, args))
            self.process.stdin.flush()
            result = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            self.process.kill()
            self.process.wait()
            raise OSError("the process that writes checkpoints died") from error
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        with suppress(BrokenPipeError):
            pickle.dump(None, self.process.stdin)  # forked processes, such as data workers, may hold the input open
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class _Pickler(pickle.Pickler):
    def __init__(self, file: Any, block: Tensor) -> None:
        super().__init__(file)
        self.begin, self.end = block.data_ptr(), block.data_ptr() + len(block)

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Tensor) and self.begin <= obj.data_ptr() < self.end and obj.is_contiguous():
            return obj.data_ptr() - self.begin, obj.nbytes, obj.dtype, obj.shape
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, block: Tensor) -> None:
        super().__init__(file)
        self.block = block

    def persistent_load(self, pid: Any) -> Tensor:
        start, n_bytes, dtype, shape = pid
        return self.block[start : start + n_bytes].view(dtype).view(shape)


def serve() -> None:
    """Run the functions that the trainer sends, until it ends."""
    fd, n_bytes = map(int, sys.argv[1:])
    results = os.fdopen(os.dup(1), mode="wb")
    os.dup2(2, 1)  # what libraries print
    torch.set_num_threads(1)
    block = _map(fd, n_bytes)
    while True:
        try:
            task = _Unpickler(sys.stdin.buffer, block).load()
        except EOFError:
            return
        if task is None:
            return
        function, args = task
        try:
            result = function(*args)
        except Exception as error:
            result = error
        with suppress(BrokenPipeError):  # the trainer was killed
            pickle.dump(result, results)
            results.flush()


def _map(fd: int, n_bytes: int) -> Tensor:
    if not n_bytes:
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_file(f"/dev/fd/{fd}", shared=True, size=n_bytes, dtype=torch.uint8)
