"""Ideas plugged in from outside: an update rule, and something every N steps."""

import gc
from pathlib import Path

import pytest
import torch

from tests.conftest import metrics, trained
from training.checkpoint import open_checkpoint
from training.config import Dtype, OptimizerConfig, PrecisionConfig, TrainingError
from training.loop import Periodic, Run
from training.optim.optimizer import Chunk, Optimizer, UpdateRule
from training.setup import compute_dtype


class Momentum(UpdateRule):
    """SGD with momentum, decoupled weight decay and a setting of its own."""

    state_names = ("momentum",)

    def update(self, chunk: Chunk) -> None:
        for master, grad, momentum in zip(chunk.masters, chunk.grads, chunk.state["momentum"], strict=True):
            momentum.mul_(self.config.options["momentum"]).add_(grad)
            master.mul_(1 - chunk.lr * chunk.weight_decay).sub_(momentum, alpha=chunk.lr)


MOMENTUM = [f"optimizer.name={__name__}:Momentum", "+optimizer.options.momentum=0.8", "optimizer.lr=0.1"]


def test_a_rule_from_outside_trains_saves_and_resumes(tmp_path: Path, small: list[str]) -> None:
    settings = [*small, *MOMENTUM, "precision=bf16"]
    trained(tmp_path / "whole", *settings, "steps=4")
    trained(tmp_path / "r", *settings, "steps=4", "checkpoint.every=2", "checkpoint.keep=0")
    (tmp_path / "r" / "checkpoints" / "step-00000004" / "manifest.json").unlink()  # as if killed after step 2
    trained(tmp_path / "r", *settings, "steps=4", "checkpoint.every=2", "checkpoint.keep=0")
    one, other = (open_checkpoint(tmp_path / name).read("") for name in ("whole", "r"))
    assert {name.rpartition(".")[2] for name in one if name.startswith("optimizer.")} == {"momentum", "step"}
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    losses = [record["train/loss"] for record in metrics(tmp_path / "r") if "train/loss" in record]
    assert losses[-1] < losses[0]


def test_an_action_runs_every_n_steps_with_the_run_at_hand(tmp_path: Path, small: list[str]) -> None:
    steps: list[int] = []

    def weight_norm(run: Run) -> None:
        assert not gc.isenabled(), "it would stop the host within a step"
        steps.append(run.state.step)
        norm = run.engine.model.get_parameter("embed.weight").detach().norm()
        run.report.loggers.log({"step": run.state.step, "train/embed_norm": float(norm)})

    periodic = [Periodic(3, weight_norm), Periodic(0, weight_norm, at_end=True)]
    trained(tmp_path / "r", *small, "steps=7", periodic=periodic)
    assert steps == [3, 6, 7]
    assert [r["step"] for r in metrics(tmp_path / "r") if "train/embed_norm" in r] == steps


@pytest.mark.parametrize("name", ["nowhere:Rule", f"{__name__}:NoSuchRule"])
def test_an_unknown_rule_is_named(name: str) -> None:
    with pytest.raises(TrainingError, match=rf"optimizer.name \({name}\)"):
        Optimizer(torch.nn.Linear(2, 2), OptimizerConfig(name=name))
    assert any("optimizer.name" in problem for problem in OptimizerConfig(name="adam").problems())


def test_auto_precision_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu, auto = torch.device("cpu"), torch.device("cuda", 0), PrecisionConfig()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for has_bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=has_bf16: found)
        assert compute_dtype(auto, cpu) is dtype
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, dtype in (((7, 0), torch.float32), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert compute_dtype(auto, gpu) is dtype
    assert compute_dtype(PrecisionConfig(compute=Dtype.fp16), cpu) is torch.float16
