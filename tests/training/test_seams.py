"""Ideas plugged in from outside: an update rule, and something every N steps."""

from pathlib import Path

import pytest
import torch

from tests.conftest import metrics, trained
from training.checkpoint import open_checkpoint
from training.config import Dtype, OptimizerConfig, PrecisionConfig, TrainingError
from training.loop import Periodic, Run
from training.optim.optimizer import Chunk, UpdateRule, build_optimizer
from training.setup import compute_dtype


class Momentum(UpdateRule):
    """SGD with momentum, decoupled weight decay and a setting of its own."""

    state_names = ("momentum",)

    def update(self, chunk: Chunk) -> None:
        for master, grad, momentum in zip(chunk.masters, chunk.grads, chunk.state["momentum"], strict=True):
            momentum.mul_(self.config.options["momentum"]).add_(grad)
            master.mul_(1 - chunk.lr * chunk.weight_decay).sub_(momentum, alpha=chunk.lr)


MOMENTUM = [f"optimizer.name={__name__}:Momentum", "+optimizer.options.momentum=0.8", "optimizer.lr=0.1"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rule_works_on_fp32_masters_of_any_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    low = torch.nn.Linear(8, 4).to(dtype)
    full = torch.nn.Linear(8, 4)
    full.load_state_dict({name: param.float() for name, param in low.state_dict().items()})
    config = OptimizerConfig(name=f"{__name__}:Momentum", weight_decay=0.0, options={"momentum": 0.8})
    optimizer = build_optimizer(low, config)
    optimizer.set_schedule([(1e-4, 0.95)] * 20)
    reference = torch.optim.SGD(full.parameters(), lr=1e-4, momentum=0.8)
    for _ in range(20):  # each far below a step of bf16
        for param, other in zip(low.parameters(), full.parameters(), strict=True):
            param.grad = torch.randn_like(param)
            other.grad = param.grad.float() / 4
        optimizer.step(grad_scale=torch.tensor(4.0), finite=torch.tensor(True))
        reference.step()
    saved = optimizer.state_tensors()
    for name, param in full.named_parameters():
        torch.testing.assert_close(saved[f"model.{name}"], param.detach(), rtol=1e-6, atol=1e-7)
        momentum = reference.state[param]["momentum_buffer"]
        torch.testing.assert_close(saved[f"optimizer.{name}.momentum"], momentum, rtol=1e-6, atol=1e-6)
    assert saved["optimizer.weight.step"] == 20


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
        steps.append(run.state.step)
        norm = run.engine.model.get_parameter("embed.weight").detach().norm()
        run.report.loggers.log({"step": run.state.step, "train/embed_norm": float(norm)})

    periodic = [Periodic(3, weight_norm), Periodic(0, weight_norm, at_end=True)]
    trained(tmp_path / "r", *small, "steps=7", periodic=periodic)
    assert steps == [3, 6, 7]
    assert [r["step"] for r in metrics(tmp_path / "r") if "train/embed_norm" in r] == steps


def test_an_action_can_end_the_run(tmp_path: Path, small: list[str]) -> None:
    def finish(run: Run) -> None:
        run.finished = True

    trained(tmp_path / "r", *small, periodic=[Periodic(4, finish)])
    assert open_checkpoint(tmp_path / "r").step == 4


@pytest.mark.parametrize("name", ["nowhere:Rule", f"{__name__}:NoSuchRule"])
def test_an_unknown_rule_is_named(name: str) -> None:
    with pytest.raises(TrainingError, match=rf"optimizer.name \({name}\)"):
        build_optimizer(torch.nn.Linear(2, 2), OptimizerConfig(name=name))
    assert any("optimizer.name" in problem for problem in OptimizerConfig(name="adam").problems())


def test_auto_precision_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu, auto = torch.device("cpu"), torch.device("cuda", 0), PrecisionConfig()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for has_bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=has_bf16: found)
        assert compute_dtype(auto, cpu)[0] is dtype
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, dtype in (((7, 0), torch.float32), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        found, reason = compute_dtype(auto, gpu)
        assert found is dtype and "auto" in reason
    assert compute_dtype(PrecisionConfig(compute=Dtype.fp16), cpu) == (torch.float16, "fp16")


def test_a_run_resumes_on_another_precision_of_auto(
    tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*(setting for setting in small if not setting.startswith("precision")), "steps=4"]
    (tmp_path / "stop").write_text("2")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    trained(tmp_path / "r", *settings, f"checkpoint.stop_file={tmp_path / 'stop'}")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert trained(tmp_path / "r", *settings) is not None
    assert open_checkpoint(tmp_path / "r").step == 4
