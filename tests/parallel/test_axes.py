"""Layouts that cannot work are found before torch is imported, all problems at once."""

from typing import Any

import pytest

from parallel.axes import Axes, layout_problems, resolve_axes, stage_layers, stages_of
from parallel.config import Device, ParallelConfig, Schedule
from tests.models import small_model

MODEL = small_model(vocab_size=1000, n_layers=4, n_heads=8, n_kv_heads=4, d_ff=96)


def problems(world_size: int, *, pack_len: int = 64, steps: tuple[int, ...] = (16,), **fields: Any) -> list[str]:
    config = ParallelConfig(**{"zero_stage": 1, **fields})
    wrong = list(layout_problems(config, world_size, model=MODEL, pack_len=pack_len, micro_batches=steps))
    return [*config.problems(), *wrong]


@pytest.mark.parametrize(
    ("world_size", "sizes", "axes"),
    [
        (8, {"dp_shard": -1}, Axes(dp_shard=8)),
        (8, {"dp_shard": -1, "tp": 2, "pp": 2}, Axes(pp=2, dp_shard=2, tp=2)),
        (1024, {"dp_replicate": -1, "dp_shard": 8}, Axes(dp_replicate=128, dp_shard=8)),
        (1, {"dp_shard": -1}, Axes()),
        (8, {"pp": 2, "dp_replicate": 2, "cp": 2}, Axes(pp=2, dp_replicate=2, cp=2)),
    ],
)
def test_one_axis_fills_the_world(world_size: int, sizes: dict[str, Any], axes: Axes) -> None:
    found = resolve_axes(ParallelConfig(zero_stage=1, **sizes), world_size)
    assert found == axes and found.world_size == world_size


def test_fitting_layout_has_no_problems() -> None:
    assert problems(8, pp=2, dp_shard=2, tp=2) == []


@pytest.mark.parametrize(
    ("world_size", "fields", "words"),
    [
        (8, {"dp_shard": 4}, ["parallel.dp_shard (4)", "(8)"]),
        (8, {"dp_shard": -1, "tp": 3}, ["parallel.dp_shard (-1) x parallel.tp (3)", "3 must", "(8)"]),
        (8, {"dp_shard": -1, "tp": -1}, ["parallel.dp_shard (-1) x parallel.tp (-1)"]),
        (2, {"tp": 0}, ["parallel.tp (0)"]),
        (16, {"tp": 16}, ["parallel.tp (16)", "model.n_heads (8), model.n_kv_heads (4), model.vocab_size (1000)", "1, 2, 4"]),
        (16, {"cp": 16}, ["parallel.cp (16)", "model.n_heads / parallel.tp (8)", "1, 2, 4, 8"]),
        (32, {"dp_shard": -1}, ["dp_replicate x dp_shard (32)", "(16)", "global_batch_tokens"]),
        (8, {"pp": 8}, ["parallel.pp x virtual_stages (8)", "model.n_layers (4)"]),
        (16, {"pp": 4, "dp_shard": 4, "pipeline_layers": [1, 1, 1]}, ["parallel.pipeline_layers ([1, 1, 1])", "4 numbers"]),
        (32, {"pp": 4, "dp_shard": 8}, ["parallel.pp x virtual_stages (4)", "(2)", "global_batch_tokens"]),
        (2, {"dp_shard": 2, "zero_stage": 0}, ["parallel.dp_shard (2)", "zero_stage"]),
        (1, {"async_tp": True, "sequence_parallel": False}, ["parallel.async_tp (true)", "tp", "sequence_parallel"]),
        (1, {"cuda_graphs": True, "device": Device.cpu}, ["parallel.cuda_graphs (true)", "device cuda"]),
        (2, {"cuda_graphs": True, "pp": 2}, ["parallel.cuda_graphs (true)", "pp 1"]),
        (2, {"pp": 2, "pipeline_schedule": Schedule["interleaved_1f1b"]}, ["parallel.virtual_stages (1)", "2 or more"]),
        (8, {"pack_len": 36, "tp": 2, "cp": 4, "steps": (16, 4)}, ["parallel.cp x parallel.tp (8)", "(36)", "data.seq_len"]),
        (2, {}, ["every axis (1)", "(2)"]),
    ],
)  # fmt: skip
def test_layout_problem_names_keys_and_values(world_size: int, fields: dict[str, Any], words: list[str]) -> None:
    problem = problems(world_size, **fields)[-1]
    assert all(word in problem for word in words), problem


def test_all_problems_are_found_at_once() -> None:
    wrong = problems(6, pp=2, tp=3, steps=(1,), zero_stage=4)
    assert len(wrong) == 4 and "zero_stage (4)" in wrong[0] and "model.n_heads (8)" in wrong[1]


def test_every_stage_has_layers_and_a_rank() -> None:
    axes = Axes(pp=4)
    assert stage_layers(ParallelConfig(pp=4), axes, 6) == [range(2), range(2, 4), range(4, 5), range(5, 6)]
    for turns in (1, 3):
        config = ParallelConfig(pp=4, virtual_stages=turns)
        owned = [stage for rank in range(4) for stage in stages_of(rank, 4, config)]
        assert sorted(owned) == list(range(4 * turns))
