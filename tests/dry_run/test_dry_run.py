"""Collectives, memory and FLOPs of dry runs equal the closed forms of their layouts, on up to 1,024 fake GPUs."""

import subprocess
import sys
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hydra import compose, initialize_config_dir

from conf.cli import CONF
from conf.schema import TrainConfig, register, to_config
from dry_run.fake_gpu import TRITON_KERNELS
from dry_run.run import run_dry_run
from dry_run.step_profile import StepProfile, profile_rank, profile_step
from model.counts import count_params
from training.config import Fp8

ROOT = Path(__file__).parent.parent.parent
WORLD, MICRO_BATCHES, LAYERS = 1024, 2, 2
BF16 = 2


def configure(*overrides: str, world_size: int = WORLD) -> TrainConfig:
    """Compose InternLM-7B with fewer layers and micro-batches of 4,096 tokens."""
    register()
    settings = [
        "dry_run='true'", f"dry_run.world_size={world_size}", "model=7b", f"model.n_layers={LAYERS}", "data=random",
        "data.seq_len=2048", "data.micro_batch_size=2",
    ]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_config(compose("train", overrides=[*settings, *overrides]))


@cache
def profile(*overrides: str, world_size: int = WORLD) -> tuple[TrainConfig, StepProfile]:
    """Profile a step of `MICRO_BATCHES` per rank, of a layout without a pipeline."""
    config = configure(*overrides, world_size=world_size)
    (found,) = profile_step(config, MICRO_BATCHES)
    return config, found


def padded(rows: int, shard: int) -> int:
    return -(-rows // shard) * shard


def n_params_of(config: TrainConfig, *, tp: int, shard: int, layers: int, embed: bool = True, head: bool = True) -> int:
    """Parameters of a tp rank: matrices are split over tp, then rows are padded for FSDP."""
    width, d_ff = config.model.d_model, config.model.d_ff
    columns = 3 * (padded(width // tp, shard) * width + padded(width // tp, shard))
    rows = width * (width // tp) + width + width * (d_ff // tp)
    block = columns + rows + 2 * padded(d_ff // tp, shard) * width + 2 * width
    vocabulary = padded(config.model.vocab_size // tp, shard) * width
    return layers * block + embed * vocabulary + head * (vocabulary + width)


class Sizes:
    """Parameter counts of FSDP's groups: each block, the embedding, and the rest."""

    def __init__(self, config: TrainConfig, shard: int) -> None:
        layers, part = config.model.n_layers, partial(n_params_of, config, tp=1, shard=shard)
        vectors = layers * 6 * config.model.d_model  # biases and norms
        matrices = part(layers=layers, embed=False, head=False) - vectors
        self.in_8_bits = matrices if config.precision.fp8 is Fp8.tensorwise else 0
        self.rest, self.all, self.groups = part(layers=0, embed=False), part(layers=layers), layers + 2


def metric_bytes(dp: int) -> int:
    """Bytes that each step reduces over all ranks: targets per micro-batch; loss, four sums per source, norm."""
    return 8 * dp * MICRO_BATCHES + 8 * 6


def data_parallel_collectives(
    sizes: Sizes, shard: int, *, gathers: tuple[int, int], scatters: int, reduce_bytes: int = 4
) -> dict[tuple[str, str], tuple[int, int]]:
    """Return the closed form; `gathers` is how often a step gathers each block or the embedding, and the rest."""
    replicas = WORLD // shard
    dp = "+".join(name for name, size in (("dp_replicate", replicas), ("dp_shard", shard)) if size > 1)
    expected = {}
    if replicas > 1:
        expected["dp_replicate", "all_reduce"] = (sizes.groups, reduce_bytes * sizes.all // shard)
    if shard > 1:
        blocks, rest = gathers
        expected["dp_shard", "all_gather"] = (
            blocks * (sizes.groups - 1) + rest,
            BF16 * (blocks * (sizes.all - sizes.rest) + rest * sizes.rest) - blocks * sizes.in_8_bits,
        )
        expected["dp_shard", "reduce_scatter"] = (scatters * sizes.groups, scatters * reduce_bytes * sizes.all)
        if sizes.in_8_bits:  # the largest value of each matrix of a block
            expected["dp_shard", "all_reduce"] = (1, 4 * 7 * LAYERS)
    count, n_bytes = expected.get((dp, "all_reduce"), (0, 0))
    expected[dp, "all_reduce"] = (count + 2, n_bytes + metric_bytes(WORLD))
    return expected


@pytest.mark.parametrize(
    ("overrides", "shard", "gathers", "scatters", "reduce_bytes"),
    [
        (["parallel=ddp"], 1, (0, 0), 0, 4),
        (["parallel=ddp", "parallel.reduce_dtype=bf16"], 1, (0, 0), 0, 2),
        (["parallel=zero1"], WORLD, (1, 1), 1, 4),
        (["parallel=hybrid_zero"], 8, (1, 1), 1, 4),
        (["parallel=hybrid_zero", "parallel.reduce_dtype=bf16"], 8, (1, 1), 1, 2),
        (["parallel=hybrid_zero", "parallel.dp_shard=64"], 64, (1, 1), 1, 4),
        (["parallel=zero2"], WORLD, (1, 1), MICRO_BATCHES, 4),
        (["parallel=hybrid_zero", "parallel.zero_stage=2"], 8, (1, 1), MICRO_BATCHES, 4),
        (["parallel=zero3"], WORLD, (2 * MICRO_BATCHES, MICRO_BATCHES), MICRO_BATCHES, 4),
        (["parallel=hybrid_zero", "parallel.zero_stage=3"], 8, (2 * MICRO_BATCHES, MICRO_BATCHES), MICRO_BATCHES, 4),
        (["parallel=zero1", "precision=fp8"], WORLD, (1, 1), 1, 4),
        (["parallel=hybrid_zero", "precision=fp8"], 8, (1, 1), 1, 4),
        (["parallel=zero3", "precision=fp8"], WORLD, (2 * MICRO_BATCHES, MICRO_BATCHES), MICRO_BATCHES, 4),
    ],
    ids=str,
)
def test_data_parallel_collectives_on_1024_gpus(
    overrides: list[str], shard: int, gathers: tuple[int, int], scatters: int, reduce_bytes: int
) -> None:
    config, found = profile(*overrides)
    expected = data_parallel_collectives(
        Sizes(config, shard), shard, gathers=gathers, scatters=scatters, reduce_bytes=reduce_bytes
    )
    assert found.collectives == expected


def test_a_reduction_too_many_is_noticed() -> None:
    def always(model: Any, _zero_stage: int, *, last: bool) -> None:
        model.set_requires_gradient_sync(True)
        model.set_reshard_after_backward(last)

    with mock.patch("parallel.engine.set_gradient_sync", always):
        config, found = profile.__wrapped__("parallel=hybrid_zero")
    expected = data_parallel_collectives(Sizes(config, 8), 8, gathers=(1, 1), scatters=1)
    assert found.collectives != expected
    scattered = expected["dp_shard", "reduce_scatter"]
    assert found.collectives["dp_shard", "reduce_scatter"] == tuple(MICRO_BATCHES * figure for figure in scattered)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_tensor_parallel_collectives_carry_activations_and_no_logits(sequence_parallel: bool) -> None:
    tp, shard = 2, WORLD // 2
    config, found = profile("parallel=tp_zero1", f"parallel.sequence_parallel={str(sequence_parallel).lower()}")
    tokens, width, numbers = 4096, config.model.d_model, n_params_of(config, tp=tp, shard=shard, layers=LAYERS)
    # Attention, MLP, embedding and head each send whole activations once forward and once backward.
    sent = MICRO_BATCHES * (4 * LAYERS + 2)
    loss = (3 * MICRO_BATCHES, 5 * 4 * tokens * MICRO_BATCHES)  # largest logit; three sums; the first of the largest
    norms = 2 * LAYERS + 1
    expected = {
        ("dp_shard", "all_gather"): (LAYERS + 2, BF16 * numbers),
        ("dp_shard", "reduce_scatter"): (LAYERS + 2, 4 * numbers),
        ("dp_shard+tp", "all_reduce"): (2, metric_bytes(WORLD // tp)),
    }
    whole = sent * BF16 * tokens * width
    if sequence_parallel:
        expected["tp", "all_gather"] = expected["tp", "reduce_scatter"] = (sent, whole)
        expected["tp", "all_reduce"] = (loss[0] + norms, loss[1] + 4 * width * norms)
    else:
        expected["tp", "all_reduce"] = (sent + loss[0], whole + loss[1])
    assert found.collectives == expected


@pytest.mark.slow
def test_fp8_changes_only_the_gathered_weights_on_tp() -> None:
    _, bf16 = profile("parallel=tp_zero1")
    config, found = profile("parallel=tp_zero1", "precision=fp8")
    tp, shard, width = 2, WORLD // 2, config.model.d_model
    vectors = 3 * padded(width // tp, shard) + 3 * width  # biases and norms
    matrices = n_params_of(config, tp=tp, shard=shard, layers=LAYERS, embed=False, head=False) - LAYERS * vectors
    count, n_bytes = bf16.collectives["dp_shard", "all_gather"]
    changed = {("dp_shard", "all_gather"): (count, n_bytes - matrices), ("dp_shard", "all_reduce"): (1, 4 * 7 * LAYERS)}
    assert found.collectives == {**bf16.collectives, **changed}


def test_context_parallel_collectives() -> None:
    config, found = profile("parallel=cp")
    # q, k, v and the output of every layer, forward and backward, half of the tokens here
    count = 8 * LAYERS * MICRO_BATCHES
    assert found.collectives["cp", "all_to_all"] == (count, count * BF16 * 4096 // 2 * config.model.d_model)
    numbers = n_params_of(config, tp=1, shard=WORLD, layers=LAYERS)
    assert found.collectives["dp_shard+cp", "reduce_scatter"] == (LAYERS + 2, 4 * numbers)


@pytest.mark.slow
def test_pipeline_stages_hold_their_layers_and_send_activations() -> None:
    config = configure("parallel=3d", "model.n_layers=4")
    stages = profile_step(config, 4)
    assert [found.rank for found in stages] == [0, WORLD // 2]
    for found, ends in zip(stages, ({"head": False}, {"embed": False}), strict=True):
        numbers = n_params_of(config, tp=2, shard=WORLD // 4, layers=2, **ends)
        assert found.collectives["dp_shard", "all_gather"] == (3, BF16 * numbers)
        assert found.collectives["dp_shard", "reduce_scatter"] == (3, 4 * numbers)
        for kind in ("send", "recv"):
            passed = 4 * BF16 * 4096 * config.model.d_model // 2  # a tp peer has half of the tokens
            assert 0 <= found.collectives["pp", kind][1] - passed <= 8


@cache
def pipeline_of_2(schedule: str, zero_stage: int) -> tuple[TrainConfig, list[StepProfile]]:
    config = configure(
        "parallel=hybrid_zero", "parallel.pp=2", f"parallel.pipeline_schedule={schedule}",
        f"parallel.zero_stage={zero_stage}", "model.n_layers=4",
    )  # fmt: skip
    return config, profile_step(config, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "zero_stage", "gathers"),
    [
        # How often a step gathers: a block and the embedding of the first stage; a block and the head of the second
        ("1f1b", 2, (1, 1, 1, 1)),
        ("1f1b", 3, (8, 8, 8, 4)),  # forward and backward; the head stays gathered between them
        ("zero_bubble", 2, (1, 1, 1, 1)),
        # For the gradients of weights too, which the first stage computes in the same pass: its inputs need none.
        ("zero_bubble", 3, (8, 8, 12, 8)),
    ],
)
def test_pipeline_collectives_per_zero_stage(
    schedule: str, zero_stage: int, gathers: tuple[int, int, int, int]
) -> None:
    config, profiles = pipeline_of_2(schedule, zero_stage)
    part = partial(n_params_of, config, tp=1, shard=8)
    blocks = part(layers=2, embed=False, head=False)
    ends = (part(layers=0, head=False), part(layers=0, embed=False))
    for found, end, of_block, of_end in zip(profiles, ends, gathers[::2], gathers[1::2], strict=True):
        assert found.collectives["dp_shard", "all_gather"] == (
            2 * of_block + of_end,
            BF16 * (of_block * blocks + of_end * end),
        )
        assert found.collectives["dp_shard", "reduce_scatter"] == (4 * 3, 4 * 4 * (blocks + end))
        assert found.collectives["dp_replicate", "all_reduce"] == (3, 4 * (blocks + end) // 8)


@pytest.mark.slow
def test_zero_bubble_weight_pass_prefetches_the_next_block() -> None:
    phases = pipeline_of_2("zero_bubble", 3)[1][1].phases
    sent = [item.kind for phase in phases for item in phase.collectives if item.axis == "dp_shard"]
    gather, reduce = "all_gather", "reduce_scatter"
    assert sent[-6:] == [gather, gather, reduce, gather, reduce, reduce]


@pytest.mark.slow
def test_pipeline_memory_per_zero_stage() -> None:
    small = 512 * 30 * 4  # each tensor is rounded up to 512 bytes
    for zero_stage in (1, 2, 3):
        config, (first, _) = pipeline_of_2("1f1b", zero_stage)
        part = partial(n_params_of, config, tp=1, shard=8, head=False)
        numbers = part(layers=2)
        # The peak is in the backward pass of the last block, the only one that ZeRO 3 has gathered then.
        gathered = part(layers=1, embed=False) if zero_stage == 3 else numbers
        assert first.bytes_at_peak["parameters"] == pytest.approx(2 * (numbers / 8 + gathered), abs=small), zero_stage
        kept = numbers if zero_stage == 1 else numbers / 8
        assert first.bytes_at_peak["gradients"] == pytest.approx(4 * kept, abs=2 * small), zero_stage


@pytest.mark.slow
def test_extrapolated_step_equals_a_full_one() -> None:
    config = configure("parallel=hybrid_zero", "parallel.zero_stage=3")
    full, extrapolated = profile_rank(config, 0, 6), profile_step(config, 6)[0]
    assert (extrapolated.collectives, extrapolated.flops) == (full.collectives, full.flops)
    assert extrapolated.time.total_s == pytest.approx(full.time.total_s, rel=1e-6)


def test_memory_by_kind() -> None:
    config, alone = profile(world_size=1)
    numbers = count_params(config.model)
    assert sum(alone.bytes_at_peak.values()) == pytest.approx(alone.peak_bytes, rel=1e-3)
    small = 512 * 30 * LAYERS  # each tensor is rounded up to 512 bytes
    assert alone.bytes_at_peak["parameters"] == pytest.approx(2 * numbers, abs=small)
    # the lower 16 bits of the masters, and two fp32 moments
    assert alone.bytes_at_peak["optimizer"] == pytest.approx(10 * numbers, abs=3 * small)
    assert alone.bytes_at_peak["gradients"] == pytest.approx(2 * numbers, abs=small)
    _, sharded = profile("parallel=zero1", "parallel.reduce_dtype=bf16", world_size=8)
    assert sharded.bytes_at_peak["optimizer"] == pytest.approx(10 * numbers / 8, abs=3 * small)
    assert sharded.bytes_at_peak["parameters"] == pytest.approx(2 * numbers * (1 + 1 / 8), abs=2 * small)
    assert sharded.bytes_at_peak["activations"] == pytest.approx(alone.bytes_at_peak["activations"], rel=0.02)


def test_memory_of_weights_gathered_in_8_bits() -> None:
    _, alone = profile("precision=fp8", world_size=1)
    config, sharded = profile("parallel=zero1", "precision=fp8", "parallel.reduce_dtype=bf16", world_size=8)
    sizes, numbers, small = Sizes(config, 8), count_params(config.model), 512 * 30 * LAYERS
    assert sharded.bytes_at_peak["parameters"] == pytest.approx(
        2 * numbers * (1 + 1 / 8) - sizes.in_8_bits, abs=2 * small
    )
    kept = alone.bytes_at_peak["activations"] - sharded.bytes_at_peak["activations"]
    assert kept == pytest.approx(sizes.in_8_bits, rel=0.05)


def test_config_is_unchanged_and_fake_modules_are_gone() -> None:
    config = configure("model.n_layers=1", world_size=1)
    before = deepcopy(config)
    run_dry_run(config)
    assert config == before
    assert not set(TRITON_KERNELS) & set(sys.modules)


def block_flops(config: TrainConfig) -> tuple[int, int]:
    """Return the FLOPs per token of one product with each matrix of the blocks, and of one causal attention product."""
    model = config.model
    kv_dim = model.n_kv_heads * model.head_dim
    matrices = 2 * model.d_model * (model.d_model + kv_dim) + 3 * model.d_model * model.d_ff
    return 2 * model.n_layers * matrices, model.n_layers * model.d_model * config.data.seq_len


@pytest.mark.parametrize(("overrides", "world_size"), [([], 1), (["parallel=zero1", "precision=fp8"], 8)], ids=str)
def test_flops_equal_the_closed_form(overrides: list[str], world_size: int) -> None:
    config, found = profile(*overrides, world_size=world_size)
    matrices, attention = block_flops(config)
    head = 2 * config.model.vocab_size * config.model.d_model
    # Of attention 2 products forward and, because a fused kernel recomputes the scores, 5 backward
    assert found.flops == MICRO_BATCHES * 4096 * (3 * (matrices + head) + 7 * attention)


def test_recomputed_blocks_cost_a_forward_pass_and_save_activations() -> None:
    config, kept = profile("parallel=hybrid_zero", world_size=8)
    _, recomputed = profile("parallel=hybrid_zero", "parallel.activation_checkpointing=full", world_size=8)
    matrices, attention = block_flops(config)
    assert recomputed.flops - kept.flops == MICRO_BATCHES * 4096 * (matrices + 2 * attention)
    assert recomputed.bytes_at_peak["activations"] < kept.bytes_at_peak["activations"]
    assert recomputed.collectives == kept.collectives


def test_command_prints_the_report(tmp_path: Path) -> None:
    command = [sys.executable, "train.py", "dry_run=true", "parallel=hybrid_zero", "dry_run.world_size=1024"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in ("1,024 GPUs", "dp_shard 8", "parameters held; peak", "reduce_scatter", "tokens/s per GPU", "overlap"):
        assert words in done.stdout
