"""A real Slurm on this machine, without systemd or cgroups: two simulated nodes of eight cores and two GPUs."""

import os
import secrets
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from launch.environment import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
NODES = ("node1", "node2")
WAIT_S = 30

# cred_expire is also how long a requeued job waits before it starts again (120 s otherwise).
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={port}
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdLogFile={root}/slurmd-%n.log
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
KillWait=20
MinJobAge=300
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def until(done: Callable[[], Any], seconds: float = 180) -> Any:
    """Wait until this is true; return it."""
    end = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def why_not() -> str:
    """Return why no Slurm can be started here, or ""."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed; on Debian and Ubuntu: apt install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root here"


@contextmanager
def cluster(root: Path) -> Iterator[dict[str, str]]:
    """Run a Slurm whose files are in `root`; yields its environment variables."""
    root.chmod(0o755)
    for name in ("munge", "state", *(f"spool-{node}" for node in NODES)):
        (root / name).mkdir(mode=0o755)
    variables = {"SLURM_CONF": str(root / "slurm.conf")}
    _write_conf(root)
    hosts, line = Path("/etc/hosts"), f"127.0.0.1 {' '.join(NODES)} # of the Slurm in {root}\n"
    hosts.write_text(hosts.read_text() + line)
    try:
        _start_munge(root)
        environment = {**os.environ, **variables}
        subprocess.run(["slurmctld", "-f", root / "slurm.conf"], check=True, env=environment, capture_output=True)
        for node in NODES:
            _start_node(root, node)
        _wait_until_idle(root, environment)
        yield variables
        subprocess.run(["scancel", "--user=root"], env=environment, timeout=10)
        time.sleep(1)
    finally:
        _end([*root.glob("slurmd-*.pid"), *root.glob("slurmctld.pid"), *root.glob("munge/pid")])
        hosts.write_text(hosts.read_text().replace(line, ""))


@contextmanager
def lost(node: str) -> Iterator[None]:
    """Have a node and all that runs on it fall silent, as in a power cut; the node is started again in the end."""
    root = Path(os.environ["SLURM_CONF"]).parent
    silent = _processes_of(root, node)
    for process in silent:
        process.suspend()  # its connections stay open and nobody answers on them
    subprocess.run(["scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost"], check=True)
    try:
        yield
    finally:
        for process in silent:
            process.kill()
        psutil.wait_procs(silent, timeout=WAIT_S)
        _start_node(root, node)  # which takes it into service again


def _processes_of(root: Path, node: str) -> list[psutil.Process]:
    """Return a node's daemon, the tasks that run there, and the daemons of their steps."""
    variables = {process: process.info["environ"] or {} for process in psutil.process_iter(["environ"])}
    tasks = [process for process, found in variables.items() if found.get("SLURMD_NODENAME") == node]
    parents = {parent for task in tasks if (parent := task.parent()) and parent.name().startswith("slurmstepd")}
    return [psutil.Process(int((root / f"slurmd-{node}.pid").read_text())), *parents, *tasks]


def _start_node(root: Path, node: str) -> None:
    subprocess.run(["slurmd", "-N", node, "-f", root / "slurm.conf"], check=True, capture_output=True)


def _write_conf(root: Path) -> None:
    host, ports = socket.gethostname().split(".")[0], set[int]()
    while len(ports) <= len(NODES):  # not always the same: a run that was killed may have left its Slurm
        ports.add(free_port())
    lines = [CONF.format(host=host, port=ports.pop(), root=root)]
    for node in NODES:
        where = f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports.pop()}"
        lines.append(f"{where} CPUs=8 RealMemory=8000 Gres=gpu:2 State=UNKNOWN\n")
    (root / "slurm.conf").write_text("".join(lines))
    (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    for gpu in range(2):  # Slurm wants character devices; these are /dev/null by another name
        os.mknod(root / f"gpu{gpu}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    nodes = ",".join(NODES)
    (root / "gres.conf").write_text(f"NodeName={nodes} Name=gpu File={root}/gpu[0-1]\n")


def _start_munge(root: Path) -> None:
    folder = root / "munge"
    (folder / "key").touch(0o600)
    (folder / "key").write_bytes(secrets.token_bytes(128))
    paths = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={folder / name}" for option, name in paths.items()]
    subprocess.run(["munged", "--force", *options], check=True, capture_output=True)


def _wait_until_idle(root: Path, environment: dict[str, str]) -> None:
    until = time.monotonic() + WAIT_S
    command = ["sinfo", "--noheader", "--Node", "--partition=main", "--states=idle", "--format=%N"]
    while time.monotonic() < until:
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
        if sorted(answer.stdout.split()) == sorted(NODES):
            return
        time.sleep(0.2)
    logs = "\n".join(path.read_text()[-2000:] for path in root.glob("*.log"))
    raise AssertionError(f"Slurm did not come up\n{logs}")


def _end(pid_files: list[Path]) -> None:
    """End daemons and wait until they are gone."""
    pids = [int(path.read_text()) for path in pid_files]
    daemons = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    for daemon in daemons:
        daemon.terminate()
    for daemon in psutil.wait_procs(daemons, timeout=5)[1]:
        daemon.kill()
    psutil.wait_procs(daemons, timeout=5)
