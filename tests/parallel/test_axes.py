"""What cannot be laid out is refused in sentences, all at once, without torch."""

from typing import Any

import pytest

from model.config import ModelConfig
from parallel.axes import Axes, layout_problems, resolve_axes, stage_layers, stages_of
from parallel.config import Compile, Device, ParallelConfig, ParallelError, Schedule

MODEL = ModelConfig(
    name="m", vocab_size=1000, d_model=32, n_layers=4, n_heads=8, n_kv_heads=4, d_ff=96, max_seq_len=64
)  # fmt: skip


@pytest.fixture(autouse=True)
def new_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel.config.version", lambda _: "2.13.0")


def told(world_size: int, model: ModelConfig = MODEL, pack_len: int = 64, steps: tuple[int, ...] = (16,), **axes: Any):
    config = ParallelConfig(**{"zero_stage": 1, **axes})
    wrong = list(layout_problems(config, world_size, model=model, pack_len=pack_len, micro_batches=steps))
    return [*config.problems(), *wrong]


@pytest.mark.parametrize(
    ("world_size", "asked", "axes"),
    [
        (8, {"dp_shard": -1}, Axes(dp_shard=8)),
        (8, {"dp_shard": -1, "tp": 2, "pp": 2}, Axes(pp=2, dp_shard=2, tp=2)),
        (1024, {"dp_replicate": -1, "dp_shard": 8}, Axes(dp_replicate=128, dp_shard=8)),
        (1, {"dp_shard": -1}, Axes()),
        (8, {"pp": 2, "dp_replicate": 2, "cp": 2}, Axes(pp=2, dp_replicate=2, cp=2)),
    ],
)
def test_one_axis_fills_the_world(world_size: int, asked: dict[str, Any], axes: Axes) -> None:
    found = resolve_axes(ParallelConfig(zero_stage=1, **asked), world_size)
    assert found == axes and found.world_size == world_size


def test_a_layout_that_fits_is_told_nothing() -> None:
    assert told(8, pp=2, dp_shard=2, tp=2) == []


@pytest.mark.parametrize(
    ("world_size", "asked", "sentences"),
    [
        (8, {"dp_shard": 4}, ["parallel.dp_shard (4) = 4 must be the number of processes (8); set one axis to -1, as in parallel=zero1, or start 4"]),
        (8, {"dp_shard": -1, "tp": 3}, ["parallel.dp_shard (-1) cannot fill the 8 processes: parallel.tp (3) = 3 does not divide 8; start a multiple of 3, or choose from 1, 2, 4, 8"]),
        (8, {"dp_shard": -1, "tp": -1}, ["parallel.dp_shard (-1) and parallel.tp (-1): only one axis can fill the 8 processes; give the others a size"]),
        (2, {"tp": 0}, ["parallel.tp (0) must be at least 1, or -1 to fill the 2 processes"]),
        (16, {"tp": 16}, ["parallel.tp (16) must divide model.n_heads (8), model.n_kv_heads (4), model.vocab_size (1000); choose from 1, 2, 4"]),
        (16, {"cp": 16}, ["parallel.cp (16) must divide the heads of a rank, model.n_heads (8) / parallel.tp (1); choose from 1, 2, 4, 8"]),
        (32, {"dp_shard": -1}, ["a step of 16 micro-batches must be divisible by the 32 data-parallel ranks (parallel.dp_replicate 1 x parallel.dp_shard 32); change global_batch_tokens, ramp or data.micro_batch_size"]),
        (8, {"pp": 8}, ["parallel.pp (8) must be at most model.n_layers (4), because every stage has a layer"]),
        (16, {"pp": 4, "dp_shard": 4, "pipeline_layers": [1, 1, 1]}, ["parallel.pipeline_layers ([1, 1, 1]) must be 4 numbers, one a stage, that sum to model.n_layers (4)"]),
        (32, {"pp": 4, "dp_shard": 8}, ["parallel.pp (4) must be at most the micro-batches a rank runs in a step (2), or the pipeline is never full; raise global_batch_tokens, lower data.micro_batch_size, or lower the data-parallel axes"]),
        (2, {"dp_shard": 2, "zero_stage": 0}, ["parallel.dp_shard (2) must be 1 with parallel.zero_stage (0), which shards nothing; use parallel.dp_replicate, or zero_stage 1, 2 or 3"]),
        (1, {"async_tp": True, "sequence_parallel": False}, ["parallel.async_tp (true) needs parallel.tp of 2 or more, or -1, not 1", "parallel.async_tp (true) needs parallel.sequence_parallel true, not False"]),
        (1, {"cuda_graphs": True, "device": Device.cpu}, ["parallel.cuda_graphs (true) needs parallel.device cuda, not cpu; choose false"]),
        (2, {"cuda_graphs": True, "tp": 2, "sequence_parallel": False}, ["parallel.cuda_graphs (true) needs one GPU, parallel.tp 1, not 2; choose false"]),
        (2, {"pp": 2, "pipeline_schedule": Schedule["zbv"]}, ["parallel.virtual_stages (1) must be exactly 2 with parallel.pipeline_schedule (zbv)"]),
        (2, {"pp": 2, "pipeline_schedule": Schedule["zero_bubble"], "compile": Compile.blocks}, ["parallel.compile (blocks) does not go with parallel.pipeline_schedule (zero_bubble), which computes the gradients of weights later than those of inputs; use parallel.compile=auto, or interleaved_1f1b"]),
    ],
)  # fmt: skip
def test_a_layout_that_does_not_fit_is_told_why(world_size: int, asked: dict[str, Any], sentences: list[str]) -> None:
    assert told(world_size, **asked) == sentences


def test_schedules_that_split_a_backward_pass_need_a_torch_that_does_it_right(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, refused in (("2.11.0+cu130", True), ("2.12.1", True), ("2.13.0+cpu", False), ("3.0", False)):
        monkeypatch.setattr("parallel.config.version", lambda _, installed=installed: installed)
        sentence = (
            f"parallel.pipeline_schedule (zero_bubble) needs torch 2.13 or later, not {installed}, which splits a backward "
            "pass wrongly; install it, or use interleaved_1f1b"
        )
        assert told(2, pp=2, pipeline_schedule=Schedule["zero_bubble"]) == [sentence] * refused


def test_rows_that_cannot_be_cut_and_several_problems_are_told_at_once() -> None:
    assert told(8, pack_len=36, tp=2, cp=4, steps=(16, 4)) == [
        "parallel.cp (4) x parallel.tp, because parallel.sequence_parallel (true) shares tokens too, = 8 must divide the tokens of a pack (36); choose another data.seq_len or data.pack_len"
    ]
    wrong = told(6, pack_len=64, pp=2, tp=3, steps=(1,))
    assert len(wrong) == 3 and "must divide model.n_heads (8)" in wrong[0] and "never full" in wrong[2]


def test_axes_that_are_no_mesh_raise_where_they_are_opened() -> None:
    with pytest.raises(ParallelError, match="must be the number of processes"):
        resolve_axes(ParallelConfig(tp=2), 4)


def test_the_first_stages_take_the_layers_left_over_and_every_stage_has_a_rank() -> None:
    axes = Axes(pp=4)
    assert stage_layers(ParallelConfig(pp=4), axes, 6) == [range(2), range(2, 4), range(4, 5), range(5, 6)]
    for schedule, turns in (("1f1b", 1), ("interleaved_1f1b", 3), ("zbv", 2)):
        config = ParallelConfig(pp=4, virtual_stages=turns, pipeline_schedule=Schedule[schedule])
        owned = [stage for rank in range(4) for stage in stages_of(rank, 4, config)]
        assert sorted(owned) == list(range(4 * turns)), schedule
