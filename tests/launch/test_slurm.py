"""What Slurm is asked before a job is queued, with programs that answer in its place."""

import sys
from pathlib import Path

import pytest

from launch import slurm
from launch.config import LauncherConfig, Where
from parallel.config import ParallelError

RUN = '#!/bin/sh\nenv > "$0.env"; echo "$@" > "$0.args"\n'
RUN_SH = RUN + 'while [ "$1" != sh ]; do shift; done; "$@"\n'  # on a node that sees what this machine does
BUSY = RUN + "echo 'srun: error: Unable to allocate resources: Requested nodes are busy' >&2; exit 1\n"


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that precede all others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"sbatch": RUN, "srun": RUN_SH}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


def launcher(**settings: object) -> LauncherConfig:
    return LauncherConfig(where=Where.slurm, **settings)  # type: ignore[arg-type]


def refusal(folder: Path, *needed: tuple[Path, str]) -> str:
    with pytest.raises(ParallelError) as error:
        slurm.check(launcher(), folder / "jobs", needed)
    return str(error.value)


def test_a_node_must_see_what_a_job_needs(tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus.json").touch()
    slurm.check(launcher(), tmp_path / "jobs", [(tmp_path / "corpus.json", "not on this machine, but there")])
    needed = [(tmp_path / "a", "there is no a"), (tmp_path / "b", ""), (tmp_path / "a", "there is no a")]
    first, second = refusal(tmp_path, *needed).splitlines()
    assert first == "there is no a" and f"the nodes do not see {tmp_path / 'b'};" in second
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    assert f"{tmp_path}/venv/python;" in refusal(tmp_path)
    (programs / "srun").write_text('#!/bin/sh\nfor word; do echo "unseen: $word"; done\n')
    assert "jobs (hydra.sweep.dir)" in refusal(tmp_path, *needed) and "\n" not in refusal(tmp_path, *needed)


@pytest.mark.parametrize("setup", [[], ["rsync -a /archive/a /scratch"]])
def test_what_nodes_cannot_answer_is_a_warning(
    setup: list[str], tmp_path: Path, programs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if not setup:
        (programs / "srun").write_text(BUSY)
    slurm.check(launcher(setup=setup), tmp_path / "jobs", [(tmp_path / "a", "there is no a"), (tmp_path / "b", "")])
    assert len(caplog.records) == 1 and "there is no a" in caplog.text


def test_requests_from_within_a_job_are_not_part_of_it(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"JOB_ID": "7", "CPU_BIND": "mask_cpu:0x1", "CONF": "/etc/slurm.conf"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    options = {"partition": "gpu", "srun_args": ["--cpu-bind=none"], "sbatch": {"exclusive": "True", "comment": "x"}}
    slurm.check(launcher(**options), tmp_path / "jobs")
    for program in ("sbatch", "srun"):
        variables = (programs / f"{program}.env").read_text().splitlines()
        assert [line for line in variables if line.startswith("SLURM_")] == ["SLURM_CONF=/etc/slurm.conf"]
    probe, job = ((programs / f"{program}.args").read_text().split() for program in ("srun", "sbatch"))
    assert "--partition=gpu" in probe and "--cpu-bind=none" in probe and "--nodes=1" not in probe
    assert {"--partition=gpu", "--nodes=1", "--exclusive", "--comment=x"} <= set(job)
