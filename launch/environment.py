"""Environment variables of ranks, visible GPUs, and defaults of libraries. Imports no torch.

Each of several ranks has all of VARIABLES in its environment; a single process has none.
"""

import ctypes
import math
import os
import random
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import TYPE_CHECKING

from launch.config import LauncherConfig, Where
from parallel.config import AXES, Device, ParallelConfig, ParallelError

if TYPE_CHECKING:
    from conf.schema import TrainConfig

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PORTS = range(20000, 32000)  # below the range from which systems assign ports
DEFAULTS = {  # unless set by the user; libraries read them on import
    "OMP_WAIT_POLICY": "PASSIVE",  # idle OpenMP threads sleep instead of spinning
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # less fragmentation of GPU memory
    "NCCL_GRAPH_REGISTER": "0",  # else collectives in CUDA graphs fail with expandable segments (pytorch#158029)
}


def set_library_defaults() -> None:
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def world_size(config: "TrainConfig") -> int:
    """Return the number of ranks, simulated, running or to be started; raise `ParallelError` if they do not fit."""
    if config.dry_run.enabled:
        return config.dry_run.world_size
    if joined := joined_variables(config.parallel):
        return int(joined["WORLD_SIZE"])
    if config.launcher.where is Where.slurm:
        return config.launcher.nodes * config.launcher.ranks_per_node
    return nproc_per_node(config.parallel, config.launcher)


def nproc_per_node(config: ParallelConfig, launcher: LauncherConfig | None = None) -> int:
    """Return the number of ranks that `python train.py` starts on this machine.

    That is `parallel.nproc_per_node`, else one per GPU if an axis is -1, else the product of the axes. With a
    `launcher`, only the GPUs of one sweep job count. Raises `ParallelError` if there are fewer GPUs than ranks.
    """
    n_gpus = 0 if config.device is Device.cpu else visible_gpus()
    n_gpus = n_gpus if launcher is None else launcher.gpus_per_job(n_gpus)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fewest = math.prod(size for size in sizes.values() if size != -1)
    n_ranks = config.nproc_per_node or (n_gpus if n_gpus and -1 in sizes.values() else max(1, fewest))
    if n_gpus and n_ranks > n_gpus:
        layout = " x ".join(f"parallel.{axis} ({size})" for axis, size in sizes.items() if size > 1)
        asked = f"parallel.nproc_per_node ({n_ranks})" if config.nproc_per_node else layout
        shared = " of a job (launcher.parallel_jobs)" if launcher is not None and launcher.parallel_jobs != 1 else ""
        raise ParallelError(f"{asked} must be at most the GPUs{shared} ({n_gpus}), unless parallel.device=cpu")
    return n_ranks


def visible_gpus() -> int:
    """Return the number of GPUs that the driver reports to this process."""
    count = ctypes.c_int(0)
    if os.environ.get("CUDA_VISIBLE_DEVICES", "-") not in ("", "-1") and "+cpu" not in version("torch"):
        with suppress(OSError):  # no driver
            driver = ctypes.CDLL("libcuda.so.1")
            _ = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value


def joined_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return a rank's VARIABLES as set by torchrun or srun, or {} without either."""
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return {name: environment[name] for name in VARIABLES if name in environment}
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1 or "SLURM_PROCID" not in environment:
        return {}
    step = ".".join(environment.get(f"SLURM_{name}", "") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    tasks: list[str] = []  # per node, parsed from a form such as 2(x3),1
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        n_tasks, _, times = part.partition("(x")
        tasks += [n_tasks] * int(times.rstrip(")") or 1)
    one_gpu = environment.get("CUDA_VISIBLE_DEVICES", "").isdigit()  # the only visible GPU has index 0
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": "0" if one_gpu else environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": tasks[int(environment["SLURM_NODEID"])],
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(random.Random(step).choice(PORTS)),
    }


def first_host(node_list: str) -> str:
    """Return the first host of Slurm's short form: n03 for n[03-07,9],m1."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", node_list)
    assert found, node_list
    return "".join(part or "" for part in found.groups())


def joined_variables(config: ParallelConfig) -> dict[str, str]:
    """Return `joined_environment`; raise `ParallelError` if it is incomplete, or has more local ranks than GPUs."""
    variables = joined_environment(os.environ)
    if not variables or variables == {"RANK": "0", "WORLD_SIZE": "1"}:
        return variables
    missing = [name for name in VARIABLES if name not in variables]
    if missing:
        raise ParallelError(f"{', '.join(missing)} must be set with {', '.join(variables)}, as torchrun and srun do")
    n_gpus = 0 if config.device is Device.cpu else visible_gpus()
    if n_gpus and int(variables["LOCAL_RANK"]) >= n_gpus:
        what = f"LOCAL_WORLD_SIZE ({variables['LOCAL_WORLD_SIZE']})"
        raise ParallelError(f"{what} is more than this machine's {n_gpus} GPUs; start fewer ranks")
    return variables


def free_port() -> int:
    """Return a free port for the rendezvous, outside the range of ephemeral ports."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError(f"no port between {PORTS.start} and {PORTS.stop} is free")
