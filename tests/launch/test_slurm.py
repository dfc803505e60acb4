"""What is asked of Slurm before a job is queued, with programs that answer in its place."""

import logging
import sys
from pathlib import Path

import pytest

from launch import slurm
from launch.config import LauncherConfig, Where
from parallel.config import ParallelError

RUN = '#!/bin/sh\nenv > "$0.env"; echo "$@" > "$0.args"\n'
RUN_SH = RUN + 'while [ "$1" != sh ]; do shift; done; "$@"\n'  # as a node that sees what this machine does
BUSY = RUN + "echo 'srun: error: Unable to allocate resources: Requested nodes are busy' >&2; exit 1\n"


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs, before all others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"sbatch": RUN, "srun": RUN_SH}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


def launcher(**settings: object) -> LauncherConfig:
    return LauncherConfig(where=Where.slurm, **settings)  # type: ignore[arg-type]


def test_a_node_says_what_it_does_not_see(tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus.json").touch()
    slurm.check(launcher(), tmp_path / "jobs", [(tmp_path / "corpus.json", "")])
    slurm.check(launcher(), tmp_path / "jobs", [(tmp_path / "corpus.json", "not on this machine, but there")])
    needed = [(tmp_path / "a", "there is no a"), (tmp_path / "b", ""), (tmp_path / "a", "there is no a")]
    with pytest.raises(ParallelError) as error:
        slurm.check(launcher(), tmp_path / "jobs", needed)
    unseen = f"launcher=slurm: the nodes do not see {tmp_path / 'b'}; put it on a disk that they share"
    assert str(error.value).splitlines() == ["there is no a", unseen]
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    with pytest.raises(ParallelError, match=r"nodes do not see .*/venv/python, which runs this; install it on a disk"):
        slurm.check(launcher(), tmp_path / "jobs")
    (programs / "srun").write_text('#!/bin/sh\nfor word; do echo "unseen: $word"; done\n')
    with pytest.raises(ParallelError, match=r"do not see .*/jobs; run from a folder that they share, or set") as error:
        slurm.check(launcher(), tmp_path / "jobs", needed)
    assert "\n" not in str(error.value), "nothing in it can be seen then"


@pytest.mark.parametrize("setup", [[], ["rsync -a /archive/a /scratch"]])
def test_what_no_node_can_say_is_no_reason_to_refuse(
    setup: list[str], tmp_path: Path, programs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if not setup:
        (programs / "srun").write_text(BUSY)
    with caplog.at_level(logging.WARNING):
        slurm.check(launcher(setup=setup), tmp_path / "jobs", [(tmp_path / "a", "there is no a"), (tmp_path / "b", "")])
    told = "on this machine there is no a; whether the nodes see it could not be asked"
    assert [record.message for record in caplog.records] == [told]


def test_what_is_asked_from_within_a_job_is_no_part_of_it(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"JOB_ID": "7", "CPU_BIND": "mask_cpu:0x1", "CONF": "/etc/slurm.conf"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    slurm.check(launcher(partition="gpu", srun_args=["--cpu-bind=none"]), tmp_path / "jobs")
    for program in ("sbatch", "srun"):
        variables = (programs / f"{program}.env").read_text().splitlines()
        assert [line for line in variables if line.startswith("SLURM_")] == ["SLURM_CONF=/etc/slurm.conf"]
    asked = (programs / "srun.args").read_text()
    assert "--partition=gpu" in asked and "--cpu-bind=none" in asked and "--nodes" not in asked


def test_an_option_that_is_true_stands_alone(tmp_path: Path, programs: Path) -> None:
    slurm.check(launcher(sbatch={"exclusive": "True", "mail-type": "END"}), tmp_path / "jobs")
    words = (programs / "sbatch.args").read_text().split()
    assert "--exclusive" in words and "--mail-type=END" in words
