"""The benchmarks of several GPUs, with small shapes on two CPU ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.data.conftest import write_shard

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1")
RATES = {"tokens_per_s", "ms", "host_ms", "gib"}


def results(folder: Path, *command: str) -> dict[str, dict[str, Any]]:
    paths = {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    tiny = [sys.executable, *command, "--tiny", "--seconds=0.01", "--json=found.json"]
    done = subprocess.run(tiny, cwd=folder, env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


# With four ranks only what two do not have
NODES = {
    2: {"bandwidth", "one", "one_fp8", "zero1", "zero3", "tp2", "pp2_zero1", "cp2_32k", "zero1_fp8", "checkpoint"},
    4: {"hybrid_zero", "tp2_zero1", "3d", "checkpoint"},
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", NODES)
def test_node(ranks: int, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    write_shard(tmp_path / "corpora/builtin/train/00000", [random.integers(0, 4096, 20_000)], vocab_size=4096)
    torchrun = (*TORCHRUN, f"--nproc-per-node={ranks}") if ranks > 2 else ()
    rows = (f"--rows={','.join(NODES[ranks])}",) if ranks > 2 else ()

    found = results(tmp_path, *torchrun, "-m", "benchmarks.node", *rows)

    assert NODES[ranks] <= found.keys()
    for name, m in found.items():
        if name in ("bandwidth", "bandwidth2", "checkpoint"):
            assert all(m.values()), m
        else:
            shared = set() if name.startswith("one") else {"predicted", "predicted_gib", "messages", "kept"}
            assert RATES | shared | {"tflops", "mfu"} < m.keys() and m["over_torchtitan"] is None
            assert ("links" in m) == (name in ("tp2", "tp2_zero1", "tp4"))
            assert all(value > 0 for value in m.get("links", {}).values())
    losses = found["checkpoint"]
    assert losses["resumed_loss"] == pytest.approx(losses["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_multi_gpu(tmp_path: Path) -> None:
    found = results(tmp_path, "-m", "benchmarks.multi_gpu", "--no-peer")

    assert {"one_1b", "zero1", "zero3", "tp", "cp", "pp"} < found.keys()
    assert all(m.keys() >= RATES and ("kept" in m) != name.startswith("one") for name, m in found.items())


def test_is_resumed_only_with_the_next_loss() -> None:
    from benchmarks.checkpoint import is_resumed

    losses = {"first_loss": 8.4, "loss": 8.0}
    assert is_resumed({**losses, "resumed_loss": 8.001}, 1e-3)
    assert not is_resumed({**losses, "resumed_loss": 8.1}, 1e-3)
    assert not is_resumed({**losses, "resumed_loss": 8.4}, 0.1)  # nothing was loaded
