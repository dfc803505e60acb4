"""A ladder's rules, and a law that is fitted to losses made by one."""

import json
from pathlib import Path
from typing import Any

import pytest

from conf.ladder import ladder, n_params
from conf.schema import register
from model.config import ModelConfig, Parametrization
from model.transformer import Transformer
from tests.conftest import composed
from tracking.scaling_law import Law, Point, fit, report
from training.config import CheckpointError

LAW = Law(1.7, 400.0, 0.34, 900.0, 0.28)
SIZES = (10**6, 3 * 10**6, 10**7, 3 * 10**7)


def test_law_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [Point(n, tokens, LAW.loss(n, tokens)) for n in SIZES for tokens in (5 * n, 40 * n)]
    found = fit(points)
    assert found.alpha == pytest.approx(0.34, abs=0.02) and found.beta == pytest.approx(0.28, abs=0.02)
    assert found.loss(10**9, 2 * 10**10) == pytest.approx(LAW.loss(10**9, 2 * 10**10), rel=0.01)
    monkeypatch.setattr("tracking.scaling_law.EXPONENTS", [0.28, 0.34])
    monkeypatch.setattr("tracking.scaling_law.read_points", lambda _: points)
    assert "90,000,000  3,600,000,000" in report(tmp_path), "the next size is larger than the largest"


def test_law_of_a_ladder_has_one_term() -> None:
    one = Law(2.0, 100.0, 0.3)
    found = fit([Point(n, 20 * n, one.loss(n, 20 * n)) for n in SIZES])
    assert found.b == 0 and found.alpha == pytest.approx(0.3, abs=0.02)
    assert found.loss(10**8, 2 * 10**9) == pytest.approx(one.loss(10**8, 1), rel=5e-3)


def test_rising_losses_are_refused() -> None:
    with pytest.raises(CheckpointError):
        fit([Point(n, 20 * n, loss) for n, loss in zip(SIZES, [2.0, 2.5, 3.0], strict=False)])


def test_report_predicts_the_next_size_and_the_largest_from_the_others(tmp_path: Path) -> None:
    one = Law(2.0, 100.0, 0.3)
    for depth in (2, 3, 4, 6):
        d_model = int(ladder("width", depth))
        shape = {"d_model": d_model, "n_layers": depth, "n_heads": depth, "n_kv_heads": depth, "d_ff": 3 * d_model}
        shape["vocab_size"] = 1024
        size, folder = n_params(**shape), tmp_path / str(depth)
        folder.mkdir()
        record = {"step": 9, "tokens": 20 * size, "valid/loss": one.loss(size, 1)}
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        status = {"state": "finished", "config": {"model": shape, "steps": 9}}
        (folder / "status.json").write_text(json.dumps(status))
    text = report(tmp_path)
    assert "predicted" in text and float(text.split("for the largest, ")[1].split("%")[0]) == pytest.approx(0, abs=0.3)
    assert (tmp_path / "scaling_law.png").stat().st_size > 10_000 and text in (tmp_path / "scaling_law.md").read_text()


def test_parameters_are_those_of_the_model() -> None:
    shape: dict[str, Any] = {"d_model": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 192}
    shape["vocab_size"] = 512
    model = Transformer.on_meta(ModelConfig(name="m", max_seq_len=64, **shape))
    matrices = [param for name, param in model.named_parameters() if param.ndim == 2 and name != "embed.weight"]
    assert n_params(**shape) == sum(param.numel() for param in matrices)


def test_rules_give_a_run_that_fits() -> None:
    register()
    depths = (4, 8, 12)
    assert [ladder("width", depth) for depth in depths] == [256, 512, 768]
    assert [ladder("d_ff", ladder("width", depth)) for depth in depths] == [704, 1408, 2048]
    for depth in depths:
        batch, steps = int(ladder("batch_tokens", depth, 32768)), ladder("steps", depth, 32768)
        heads = depth
        size = n_params(64 * depth, depth, heads, heads, int(ladder("d_ff", 64 * depth)), 32768)
        assert batch * steps == pytest.approx(20 * size, rel=0.01) and batch & (batch - 1) == 0
        # the share of all tokens that weights are averaged over
        lr, decay = ladder("lr", depth, 32768, 2e-3), ladder("weight_decay", depth, 32768, 0.1)
        assert batch / (lr * decay * 20 * size) == pytest.approx(2**19 / (2e-3 * 0.1 * 2.2e9), rel=1e-6)


def test_the_experiments_follow_the_rules() -> None:
    config = composed("experiment=ladder", "data=random", "model.n_layers=6")
    assert not list(config.problems()) and config.model.parametrization is Parametrization.completep
    assert (config.model.d_model, config.model.n_heads, config.model.d_ff) == (384, 6, 1024)
    assert (config.steps, config.global_batch_tokens) == (ladder("steps", 6, 32768), ladder("batch_tokens", 6, 32768))
    assert config.optimizer.lr == ladder("lr", 6, 32768, 2e-3)
    wide = composed("experiment=mup_transfer", "model.d_model=128")
    assert not list(wide.problems()) and (wide.model.n_heads, wide.model.d_ff) == (2, 384)
