"""What Slurm is asked to run, with programs that answer in its place."""

import json
import sys
from pathlib import Path

import pytest
from submitit.core.utils import JobPaths

from launch import slurm
from launch.config import LauncherConfig, Where
from launch.jobs import Job
from parallel.config import ParallelError
from tests.conftest import composed
from tracking.status import Status, read_status

SBATCH = '#!/bin/sh\nenv > "$0.env"; cat "$1" > "$0.script"; echo "Submitted batch job 7"\n'
REFUSES = "#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2; exit 1\n"


def test_submitted_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name, value in {"JOB_ID": "7", "CPU_BIND": "mask_cpu:0x1", "CONF": "/etc/slurm.conf"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name, text in {"sbatch": SBATCH, "srun": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    options = {"partition": "gpu", "mem_gb": 3, "sbatch": {"exclusive": "True", "comment": "x"}, "time": "1:30:30"}
    config = LauncherConfig(where=Where.slurm, gpus_per_node=2, srun_args=["--cpu-bind=none"], **options)  # type: ignore[arg-type]
    assert slurm.submit([str], config, tmp_path / "jobs", {"A": "b c"}) == ["7"]
    variables = (tmp_path / "sbatch.env").read_text().splitlines()
    assert [line for line in variables if line.startswith("SLURM_")] == ["SLURM_CONF=/etc/slurm.conf"]
    script = (tmp_path / "sbatch.script").read_text().splitlines()
    asked = {line.removeprefix("#SBATCH ") for line in script if line.startswith("#SBATCH ")}
    assert {"--partition=gpu", "--nodes=1", "--exclusive", "--comment=x", "--mem=3G", "--time=91", "--requeue"} <= asked
    assert {"--gpus-per-node=2", "--ntasks-per-node=2"} <= asked and "export A='b c'" in script
    assert any("--cpu-bind=none" in line for line in script if line.startswith("srun"))
    (tmp_path / "sbatch").write_text(REFUSES)
    with pytest.raises(ParallelError, match="launcher=slurm: .*invalid partition specified: gpu"):
        slurm.submit([str], config, tmp_path / "jobs", {})
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ParallelError, match="needs sbatch"):
        slurm.submit([str], config, tmp_path / "jobs", {})


def crash(_config: object, run_dir: Path) -> None:
    with Status(run_dir, {}):
        raise RuntimeError("no answer from https://me:hunter2@x")


def test_what_follows_a_crash_is_an_alert_of_one_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, sent = tmp_path / "r", tmp_path / "sent"
    run.mkdir()
    monkeypatch.setattr("launch.slurm.requeue", lambda _: "")
    monkeypatch.setattr("os._exit", sys.exit)
    config = composed("name=r", "data=random", "parallel.device=cpu", f"alerts.command='(cat; echo) >> {sent}'")
    launcher = LauncherConfig(where=Where.slurm, requeue_crashes=True)
    job = Job(f"{__name__}:crash", (config, run), run, config.parallel, launcher)
    followed = ["requeued", "not requeued: it crashed twice at the same step"]
    for attempt, what in enumerate(followed):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(attempt))
        for rank in (0, 1):
            with pytest.raises(SystemExit):
                job(JobPaths(tmp_path, job_id="7", task_id=rank))
            if not rank:
                assert read_status(run)["stop"] == {"followed": what} and what in (run / "train.log").read_text()
    shown = "".join(capsys.readouterr())
    assert "https://me:***@x" in shown and "hunter2" not in shown
    alerts = [json.loads(line) for line in sent.read_text().splitlines()]
    assert [(alert["state"], alert["reason"]) for alert in alerts] == [("requeue", what) for what in followed]
