"""Inject faults into a run of two ranks and compare it with an undisturbed run: python -m benchmarks.soak minutes=10

A fault is injected every few seconds: SIGKILL, SIGSTOP for 3 s, SIGTERM, a full disk, a flipped bit in the newest
checkpoint, a port in use. The run is restarted whenever it exits, with or without background saves. The losses of all
steps must be bit-exact.
"""

import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from tracking.metrics_file import METRICS, read_records

STEPS_PER_MINUTE = 400  # of a run with frequent restarts on a slow machine
SETTINGS = (
    "name=soak", "data=random", "data.vocab_size=1000", "data.seq_len=32", "data.micro_batch_size=2", "data.workers=1",
    "global_batch_tokens=128", "precision=fp32", "logger=none", "valid_tokens=64", "checkpoint.every=15",
    "model.d_model=32", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=64",
    "model.vocab_size=1024", "model.max_seq_len=64", "parallel=ddp", "parallel.device=cpu", "parallel.nproc_per_node=2",
    "parallel.threads=1", "parallel.step_timeout_s=60",
)  # fmt: skip


def start(folder: Path, steps: int, **variables: str) -> subprocess.Popen:
    in_background = random.choice(("true", "false"))  # saves of this start
    settings = (*SETTINGS, f"checkpoint.asynchronous={in_background}", f"steps={steps}", f"hydra.run.dir={folder}")
    command = [sys.executable, "train.py", *settings]
    with (folder.parent / f"{folder.name}.out").open("a", encoding="utf-8") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **variables})


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Return the rank processes of a run."""
    children = psutil.Process(process.pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def losses(folder: Path) -> dict[int, float]:
    records = read_records(folder / METRICS)
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


def kill(process: subprocess.Popen, _folder: Path) -> None:
    random.choice(ranks_of(process)).kill()


def stop_a_while(process: subprocess.Popen, _folder: Path) -> None:
    rank = random.choice(ranks_of(process))
    rank.suspend()
    time.sleep(3)
    rank.resume()


def terminate(process: subprocess.Popen, _folder: Path) -> None:
    random.choice([psutil.Process(process.pid), *ranks_of(process)]).send_signal(signal.SIGTERM)


def fill_disk(process: subprocess.Popen, _folder: Path) -> None:
    """Limit the file size of ranks, and of the processes that write for them, for 3 s: a full disk."""
    writers = [writer for rank in ranks_of(process) for writer in (rank, *rank.children())]
    limits = {writer.pid: resource.prlimit(writer.pid, resource.RLIMIT_FSIZE) for writer in writers}
    for pid, (_, most) in limits.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, most))
    time.sleep(3)
    for pid, limit in limits.items():
        if psutil.pid_exists(pid):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)


def flip_bit(process: subprocess.Popen, folder: Path) -> None:
    """Kill the run and flip a bit of the newest checkpoint, if there is an older one."""
    process.kill()
    process.wait()
    saved = sorted(path for path in (folder / "checkpoints").glob("step-*") if path.suffix != ".corrupt")
    files = list(saved[-1].glob("*.distcp")) if len(saved) > 1 else []
    if files:
        file = random.choice(files)
        raw = bytearray(file.read_bytes())
        raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)
        file.write_bytes(raw)


def take_port(process: subprocess.Popen, folder: Path) -> None:
    """Kill the run and start a rank on a port in use, which must fail and leave the run unchanged."""
    process.kill()
    process.wait()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        names = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        failed = start(folder, 10**6, **names, MASTER_PORT=str(taken.getsockname()[1]))
        assert failed.wait(120) not in (0, None), "a run started on a port in use"


FAULTS: tuple[Callable[[subprocess.Popen, Path], None], ...] = (
    kill, stop_a_while, terminate, fill_disk, flip_bit, take_port
)  # fmt: skip


def disturb(folder: Path, steps: int, seconds: float) -> Counter[str]:
    """Train with faults for `seconds`, and then to the end; return the count of each fault."""
    counts, end = Counter({fault.__name__: 0 for fault in FAULTS}), time.monotonic() + seconds
    while True:
        process = start(folder, steps)
        while process.poll() is None:
            before = len(losses(folder))
            while process.poll() is None and len(losses(folder)) <= before:
                time.sleep(0.2)
            if time.monotonic() > end:
                process.wait()
                break
            time.sleep(random.uniform(0.2, 3))
            fault = min(random.sample(FAULTS, len(FAULTS)), key=lambda fault: counts[fault.__name__])
            if process.poll() is None:
                print(f"step {max(losses(folder)):5d}  {fault.__name__}", flush=True)
                counts[fault.__name__] += 1
                with suppress(psutil.Error, ProcessLookupError, IndexError):  # the run has ended
                    fault(process, folder)
        if process.returncode == 0:
            return counts


def main(minutes: float, seed: int = 0) -> None:
    random.seed(seed)
    steps = max(40, round(STEPS_PER_MINUTE * minutes))
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, disturbed = Path(folder) / "undisturbed", Path(folder) / "disturbed"
        assert start(undisturbed, steps).wait() == 0
        counts = disturb(disturbed, steps, 60 * minutes)
        expected, found = losses(undisturbed), losses(disturbed)
    print(", ".join(f"{name} {count}" for name, count in counts.items()))
    wrong = [step for step in expected if found.get(step) != expected[step]]
    assert len(expected) == steps and not wrong, f"losses differ at steps {wrong[:10]}"
    print(f"{steps} steps with the same losses, bit for bit")


if __name__ == "__main__":
    main(float(sys.argv[1].partition("=")[2]) if sys.argv[1:] else 10)
