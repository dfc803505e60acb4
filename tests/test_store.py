"""Checkpoints are copied to an object store whole or not at all, and a run goes on from there."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

import evaluate
import export
import train
from conf.cli import _print_errors
from conf.schema import EvaluateConfig, ExportConfig
from parallel.config import Device, ParallelConfig
from tests.conftest import composed, trained
from tracking.list import list_runs
from tracking.status import read_status
from tracking.store import Store, local_run
from training.checkpoint import Checkpoints, open_checkpoint
from training.config import CheckpointConfig, CheckpointError, Dtype, SaveError
from training.preflight import check_run, preflight_problems


@pytest.fixture
def flaky_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server of S3 that answers every third request with 503."""
    monkeypatch.setattr("tracking.retry.WAITS_S", (0.01,) * 6)
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server")
    from werkzeug.serving import make_server

    app, count = server.DomainDispatcherApplication(server.create_backend_app), iter(range(1, 1_000_000))

    def flaky(environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        if next(count) % 3 == 0:
            start("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        return app(environ, start)

    http = make_server("127.0.0.1", 0, flaky, threaded=True)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    port = f"http://127.0.0.1:{http.port}"
    settings = {"ENDPOINT_URL": port, "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y", "MAX_ATTEMPTS": "2"}
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
    yield "s3://bucket/runs"
    http.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_resume_from_flaky_s3(flaky_s3: str, tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 15."""
    monkeypatch.chdir(tmp_path)
    settings = [*small, "checkpoint.keep=1", f"checkpoint.path={flaky_s3}"]
    trained(Path("here/r"), *settings, "steps=2", "checkpoint.asynchronous=true", "checkpoint.every=1")
    assert Store(f"{flaky_s3}/r").names() == ["step-00000002"], "as many as are kept"
    trained(Path("there/r"), *settings, "steps=3", "checkpoint.accept_changes=[steps]", "checkpoint.resume=must")
    fetched = local_run(f"{flaky_s3}/r/step-00000003")
    assert fetched == Path("runs/r") and any((fetched / "tokenizer").iterdir())
    one, other = open_checkpoint(fetched), open_checkpoint(Path("there/r"))
    assert one.step == other.step == 3 and one.state["progress"]["samples"] == 12
    assert all(torch.equal(tensor, other.read("")[name]) for name, tensor in one.read("").items())


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoints:
    monkeypatch.setattr("tracking.retry.WAITS_S", (0.01, 0.01))
    return Checkpoints(tmp_path / "r", CheckpointConfig(keep=2, path=f"file://{tmp_path}/far"))


def spoil(monkeypatch: pytest.MonkeyPatch, file: str, times: int) -> None:
    """Have a file arrive cut short, so often."""
    real, left = LocalFileSystem.put_file, iter(range(times))

    def put_file(self: LocalFileSystem, here: str, there: str, **kwargs: Any) -> None:
        real(self, here, there, **kwargs)
        if here.endswith(file) and next(left, None) is not None:
            os.truncate(there, 10)

    monkeypatch.setattr(LocalFileSystem, "put_file", put_file)


@pytest.mark.parametrize("file", ["__0_0.distcp", "state.json"])
def test_partial_copy_is_made_again(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """Case 15: a partial upload."""
    assert checkpoints.store is not None
    with monkeypatch.context() as failing:
        spoil(failing, file, times=99)
        with pytest.raises(SaveError, match="step-00000001 was saved, but not copied: .*differs from the file copied"):
            checkpoints.save(1, {"model.a": torch.ones(9)}, {})
        assert checkpoints.store.names() == [], "the manifest comes last"
    checkpoints.save(1, {"model.a": torch.zeros(9)}, {})
    assert checkpoints.store.names() == ["step-00000001"]
    assert open_checkpoint(checkpoints.folder.parent).read("model.")["a"].sum() == 9, "only the copy is made again"


def test_damaged_copy_is_not_taken(checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "__0_0.distcp", times=2)
    for step in (1, 2):
        checkpoints.save(step, {"model.a": torch.full((9,), step)}, {})
    os.truncate(tmp_path / "far" / "r" / "step-00000002" / "__0_0.distcp", 100)
    shutil.rmtree(checkpoints.folder)
    newest = checkpoints.newest()
    assert newest is not None and newest.read("model.")["a"].tolist() == [1] * 9


def test_finished_run_is_restored_as_finished(tmp_path: Path, small: list[str]) -> None:
    config, found = composed("name=r", *small, "steps=2", f"checkpoint.path=file://{tmp_path}/far"), []
    for _ in range(2):
        train.work(config, tmp_path / "r")
        found.append({key: read_status(tmp_path / "r")[key] for key in ("state", "objective")})
        shutil.rmtree(tmp_path / "r")
    assert found[0] == found[1] and found[1]["state"] == "finished" and found[1]["objective"] > 0


def test_copied_run_is_evaluated_and_exported_and_initialises_another(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained(tmp_path / "r", *small, "steps=2", f"checkpoint.path=file://{tmp_path}/far")
    parallel = ParallelConfig(device=Device.cpu)
    found = evaluate.work(EvaluateConfig(run=f"file://{tmp_path}/far/r", parallel=parallel, valid_tokens=64))
    assert found["valid/loss"] > 0 and (tmp_path / "runs" / "r" / "evaluation.json").exists()
    out = tmp_path / "hf"
    export.export(ExportConfig(run=f"file://{tmp_path}/far/r", out=str(out), dtype=Dtype.fp32))
    assert (out / "model.safetensors").exists()
    for wrong, named in (("none", "no such checkpoint"), ("r/step-00000007", "choose a step from 2")):
        with pytest.raises(CheckpointError, match=named):
            local_run(f"file://{tmp_path}/far/{wrong}")
    assert not (tmp_path / "runs" / "none").exists()
    shutil.copytree(tmp_path / "far" / "r", tmp_path / "elsewhere" / "r")
    with pytest.raises(CheckpointError, match="runs/r is not a copy of"):
        local_run(f"file://{tmp_path}/elsewhere/r")
    shutil.rmtree("runs")
    config = composed("name=s", *small, "steps=1", "optimizer.lr=1e-12", f"init_from=file://{tmp_path}/far/r")
    check_run(config, tmp_path / "s", "")
    train.work(config, tmp_path / "s")
    one, other = (open_checkpoint(tmp_path / name).read("model.") for name in ("r", "s"))
    assert all(torch.allclose(tensor, other[name], atol=1e-8) for name, tensor in one.items())


def test_no_secret_is_echoed(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run is copied, resumed from the copy, and fails because the store does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tracking.retry.WAITS_S", (0.01,))
    run = Path("runs/r")
    typed = ["checkpoint.path=file://me:hunter2@x/far", "alerts.webhook=http://127.0.0.1:9/a/hunter2"]
    config = composed("name=r", *small, "steps=2", *typed)
    train.work(config, run)
    assert local_run("file://me:hunter2@x/far/r") == run, "trained here, and copied there"
    shutil.rmtree(run)
    train.work(config, run)
    shutil.rmtree("me:hunter2@x")
    Path("me:hunter2@x").touch()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(SaveError) as failure:
        train.work(config, run)
    _print_errors(str(failure.value).splitlines())
    (run / ".hydra").mkdir()
    (run / ".hydra" / "overrides.yaml").write_text(json.dumps(typed))
    print(list_runs(Path()))
    shown = "".join(capsys.readouterr())
    assert "copied file://me:***@x/far/r/step-00000002 to" in shown and "the alert end was not sent" in shown
    assert "trying again" in shown and "error: runs/r/checkpoints/step-00000002 was saved, but not copied" in shown
    assert "checkpoint.path=file://me:***@x/far alerts.webhook=http://127.0.0.1:9/***" in shown
    texts = {name: (run / name).read_text() for name in ("train.log", "status.json", "crashes.jsonl")}
    assert not [name for name, text in {**texts, "shown": shown}.items() if "hunter2" in text or "me:***@x" not in text]


def test_unusable_addresses() -> None:
    config = composed("name=x", "data=random", "checkpoint.path=nowhere://x")
    assert [p for p in preflight_problems(config) if "Protocol not known: nowhere" in p]
    in_memory = composed("name=x", "data=random", "checkpoint.path=memory://x")
    assert [p for p in preflight_problems(in_memory) if "checkpoint.path (memory://x)" in p]
