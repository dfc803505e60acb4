"""Fixtures and helpers of all tests."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Set before torch is imported: idle OpenMP threads sleep, and leave their core to the other worker's test.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import export
import train
from conf.cli import CONF
from conf.schema import ExportConfig, TrainConfig, register, to_config
from data.mixed_text import mixed_lines
from parallel.mesh import distributed
from tracking.run_folder import locked
from training.config import Dtype
from training.loop import Periodic
from training.stop import StopRequest

ROOT = Path(__file__).parent.parent

# As on the smallest machine: results depend on the number of threads.
torch.set_num_threads(2)
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.by_file import ByFile

    return ByFile(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", help="K/N: of the files with slow tests, run those of every N-th, from the K-th on")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if part := config.getoption("--part"):
        k, n = map(int, part.split("/"))
        files = sorted({item.path for item in items if item.get_closest_marker("slow")})
        others = [i for i in items if i.get_closest_marker("slow") and i.path not in files[k::n]]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
    for item in items:
        if item.get_closest_marker("gpu"):
            # Kernel compilers warn about their own code.
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def composed_cfg(*overrides: str, command: str = "train", **options: bool) -> DictConfig:
    """Compose the configuration of a command."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(command, overrides=list(overrides), **options)


def composed(*overrides: str) -> TrainConfig:
    """Compose `train.py`'s configuration, without the check of files and devices."""
    return to_config(composed_cfg(*overrides))


def ran(*argv: str, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command such as train.py; check that it exits with `code`, and has no traceback."""
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done


def exported(run: Path, out: Path, dtype: Dtype = Dtype.fp32) -> Path:
    """Export a run; return the folder."""
    export.export(ExportConfig(run=str(run), out=str(out), dtype=dtype))
    return out


def trained(
    folder: Path, *overrides: str, stop: StopRequest | None = None, periodic: Sequence[Periodic] = ()
) -> float | None:
    """Run `train.py` in this process, in `folder`."""
    config = composed(f"name={folder.name}", *overrides)
    with distributed(config.parallel) as mesh, locked(folder, mesh.rank):
        torch.set_num_threads(2)
        stop = StopRequest(mesh) if stop is None else stop
        return train.train(config, mesh, folder, stop, periodic=periodic)


def run_ranks(main: Callable[..., None], size: int, *args: Any) -> list[int | None]:
    """Run `main(rank, *args)` in processes that import torch once; return their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([main.__module__])
    ranks: Sequence[Any] = [context.Process(target=main, args=(rank, *args)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return [process.exitcode for process in ranks]


def metrics(folder: Path) -> list[dict]:
    """Return the records of a run without its measured times."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if not key.startswith("perf/")} for record in records]


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus of two sources, prepared by `prepare_data.py`."""
    root = tmp_path_factory.mktemp("corpus")
    lines = mixed_lines()
    for source, part in (("code", lines[600:]), ("prose", lines[:600])):
        (root / "texts" / source).mkdir(parents=True)
        records = [json.dumps({"text": "".join(part[i : i + 8])}) + "\n" for i in range(0, len(part), 8)]
        (root / "texts" / source / "a.jsonl").write_text("".join(records))
    settings = [f"data.path={root / 'tokens'}", "tokenizer.vocab_size=1000", "data.valid_fraction=0.1"]
    done = ran("prepare_data.py", "data=local", f"data.input={root / 'texts'}", "workers=1", *settings)
    assert "bytes/token" in done.stdout
    assert f"next: python train.py data=local data.input={root / 'texts'} data.path={root / 'tokens'}" in done.stdout
    return root / "tokens"


@pytest.fixture(scope="session")
def small(corpus_dir: Path) -> list[str]:
    """Overrides of a run that takes a second."""
    return [
        "data=local", f"data.path={corpus_dir}", "data.seq_len=32", "data.micro_batch_size=2", "data.workers=0",
        "global_batch_tokens=128", "precision=fp32", "parallel.device=cpu", "logger=none", "steps=10", "optimizer.lr=1e-3",
        "model.d_model=32", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=64",
        "model.vocab_size=1024", "model.max_seq_len=64",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory, small: list[str]) -> Path:
    """A finished run, with its checkpoint and tokenizer."""
    folder = tmp_path_factory.mktemp("runs") / "done"
    trained(folder, *small)
    return folder


@pytest.fixture(scope="session")
def hf_dir(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of `run_dir` in fp32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.verify", lambda *_, **__: "")  # tests/test_export.py does
        return exported(run_dir, tmp_path_factory.mktemp("exports") / "hf")


@pytest.fixture
def disk_size() -> str:
    return "512k"


@pytest.fixture
def small_disk(tmp_path: Path, disk_size: str) -> Iterator[Path]:
    """A disk of its own, so small that it can be filled."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={disk_size}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)
