"""A step on a thousand GPUs sends what its layout's closed forms say, and holds what they say; no GPU is needed."""

import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hydra import compose, initialize_config_dir

from conf.cli import CONF
from conf.schema import TrainConfig, register, to_config
from dry_run.reading import Reading
from dry_run.run import dry_run
from model.counts import count_params
from training.config import Fp8

ROOT = Path(__file__).parent.parent.parent
WORLD, MICRO_BATCHES, LAYERS = 1024, 3, 3
BF16 = 2


def configure(*overrides: str, world_size: int = WORLD) -> TrainConfig:
    """Compose InternLM-7B with fewer layers and `MICRO_BATCHES` of 4,096 tokens a data-parallel rank."""
    register()
    settings = [
        "dry_run='true'", f"dry_run.world_size={world_size}", "model=7b", f"model.n_layers={LAYERS}", "data=random",
        "data.seq_len=2048", "data.micro_batch_size=2",
    ]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_config(compose("train", overrides=[*settings, *overrides]))


def read(*overrides: str, world_size: int = WORLD) -> tuple[TrainConfig, list[Reading]]:
    config = configure(*overrides, world_size=world_size)
    return config, dry_run(config).read(MICRO_BATCHES)


class Sizes:
    """Numbers of a model's groups, each of which is gathered and reduced by itself: blocks, embedding, the rest.

    A tensor's rows are filled up to a multiple of the ranks that share them.
    """

    def __init__(self, config: TrainConfig, shard: int) -> None:
        width = config.model.d_model
        vocab_size, d_ff = (-(-n // shard) * shard for n in (config.model.vocab_size, config.model.d_ff))
        assert width % shard == 0 and config.model.attention_bias and config.model.n_kv_heads == config.model.n_heads
        matrices = 4 * width * width + width * (2 * d_ff + config.model.d_ff)
        block = matrices + 4 * width + 2 * width
        self.in_8_bits = config.model.n_layers * matrices if config.precision.fp8 is Fp8.tensorwise else 0
        self.rest = vocab_size * width + width
        self.all = config.model.n_layers * block + vocab_size * width + self.rest
        self.groups = config.model.n_layers + 2


def figures(dp: int) -> int:
    """Bytes that every step adds up over all ranks: targets of each micro-batch; loss, four sums a source, norm."""
    return 8 * dp * MICRO_BATCHES + 8 * 6


def table(
    sizes: Sizes, shard: int, *, gathers: tuple[int, int], scatters: int, reduce_bytes: int = 4
) -> dict[tuple[str, str], tuple[int, int]]:
    """The closed form of a data-parallel layout.

    `gathers` says how often a step gathers a block or the embedding, and how often the rest.
    """
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
        expected["dp_shard", "reduce_scatter"] = (
            scatters * sizes.groups,
            scatters * reduce_bytes * sizes.all,
        )
        if sizes.in_8_bits:  # the largest number of each matrix of a block
            expected["dp_shard", "all_reduce"] = (1, 4 * 7 * LAYERS)
    count, n_bytes = expected.get((dp, "all_reduce"), (0, 0))
    expected[dp, "all_reduce"] = (count + 2, n_bytes + figures(WORLD))
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
def test_a_data_parallel_step_of_1024_gpus_sends_what_its_stage_says(
    overrides: list[str], shard: int, gathers: tuple[int, int], scatters: int, reduce_bytes: int
) -> None:
    config, (reading,) = read(*overrides)
    expected = table(Sizes(config, shard), shard, gathers=gathers, scatters=scatters, reduce_bytes=reduce_bytes)
    assert reading.table == expected


def fill(rows: int, shard: int) -> int:
    return -(-rows // shard) * shard


def part_of(config: TrainConfig, *, tp: int, shard: int, layers: int, embed: bool = True, head: bool = True) -> int:
    """Numbers of a rank's group: matrices are divided over tp first, and the rows that are left filled up for FSDP."""
    width, d_ff = config.model.d_model, config.model.d_ff
    columns = 3 * (fill(width // tp, shard) * width + fill(width // tp, shard))
    rows = width * (width // tp) + width + width * (d_ff // tp)
    block = columns + rows + 2 * fill(d_ff // tp, shard) * width + 2 * width
    vocabulary = fill(config.model.vocab_size // tp, shard) * width
    return layers * block + embed * vocabulary + head * (vocabulary + width)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_a_tensor_parallel_step_sends_activations_and_no_logits(sequence_parallel: bool) -> None:
    tp, shard = 2, WORLD // 2
    config, (reading,) = read("parallel=tp_zero1", f"parallel.sequence_parallel={str(sequence_parallel).lower()}")
    tokens, width, numbers = 4096, config.model.d_model, part_of(config, tp=tp, shard=shard, layers=LAYERS)
    # Each part of a block, the embedding and the head send whole activations once forward and once backward.
    sent = MICRO_BATCHES * (4 * LAYERS + 2)
    loss = (3 * MICRO_BATCHES, 5 * 4 * tokens * MICRO_BATCHES)  # largest logit; three sums; the first of the largest
    norms = 2 * LAYERS + 1
    expected = {
        ("dp_shard", "all_gather"): (LAYERS + 2, BF16 * numbers),
        ("dp_shard", "reduce_scatter"): (LAYERS + 2, 4 * numbers),
        ("dp_shard+tp", "all_reduce"): (2, figures(WORLD // tp)),
    }
    whole = sent * BF16 * tokens * width
    if sequence_parallel:
        expected["tp", "all_gather"] = expected["tp", "reduce_scatter"] = (sent, whole)
        expected["tp", "all_reduce"] = (loss[0] + norms, loss[1] + 4 * width * norms)
    else:
        expected["tp", "all_reduce"] = (sent + loss[0], whole + loss[1])
    assert reading.table == expected


@pytest.mark.slow
def test_8_bit_weights_under_tensor_parallel_are_gathered_in_8_bits_and_the_rest_is_sent_as_ever() -> None:
    _, (bf16,) = read("parallel=tp_zero1")
    config, (reading,) = read("parallel=tp_zero1", "precision=fp8")
    tp, shard, width = 2, WORLD // 2, config.model.d_model
    vectors = 3 * fill(width // tp, shard) + 3 * width  # biases and norms
    matrices = part_of(config, tp=tp, shard=shard, layers=LAYERS, embed=False, head=False) - LAYERS * vectors
    count, n_bytes = bf16.table["dp_shard", "all_gather"]
    changed = {("dp_shard", "all_gather"): (count, n_bytes - matrices), ("dp_shard", "all_reduce"): (1, 4 * 7 * LAYERS)}
    assert reading.table == {**bf16.table, **changed}


def test_a_context_parallel_step_turns_tokens_into_heads() -> None:
    config, (reading,) = read("parallel=cp")
    # q, k, v and the output of every layer, forward and backward, half of the tokens here
    count = 8 * LAYERS * MICRO_BATCHES
    assert reading.table["cp", "all_to_all"] == (count, count * BF16 * 4096 // 2 * config.model.d_model)
    numbers = part_of(config, tp=1, shard=WORLD, layers=LAYERS)
    assert reading.table["dp_shard+cp", "reduce_scatter"] == (LAYERS + 2, 4 * numbers)


@pytest.mark.slow
def test_each_stage_of_a_pipeline_holds_its_layers_and_passes_activations_on() -> None:
    config = configure("parallel=3d", "model.n_layers=4")
    stages = dry_run(config).read(4)
    assert [reading.rank for reading in stages] == [0, WORLD // 2]
    for reading, ends in zip(stages, ({"head": False}, {"embed": False}), strict=True):
        numbers = part_of(config, tp=2, shard=WORLD // 4, layers=2, **ends)
        assert reading.table["dp_shard", "all_gather"] == (3, BF16 * numbers)
        assert reading.table["dp_shard", "reduce_scatter"] == (3, 4 * numbers)
        for kind in ("send", "recv"):
            passed = 4 * BF16 * 4096 * config.model.d_model // 2  # a tp peer has half of the tokens
            assert 0 <= reading.table["pp", kind][1] - passed <= 8


@cache
def pipeline_of_2(schedule: str, stage: int) -> tuple[TrainConfig, list[Reading]]:
    config = configure(
        "parallel=hybrid_zero", "parallel.pp=2", f"parallel.pipeline_schedule={schedule}",
        f"parallel.zero_stage={stage}", "model.n_layers=4",
    )  # fmt: skip
    return config, dry_run(config).read(4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "stage", "gathers"),
    [
        # How often a step gathers a block of the first rank, its embedding; a block of the second rank, norm and head
        ("1f1b", 2, (1, 1, 1, 1)),
        ("1f1b", 3, (8, 8, 8, 4)),  # forward and backward; the head is needed at once
        ("zero_bubble", 2, (1, 1, 1, 1)),
        # For the gradients of weights too; the first rank makes all in one pass, because none wants its inputs'.
        ("zero_bubble", 3, (8, 8, 12, 8)),
    ],
)
def test_a_pipeline_gathers_and_reduces_each_micro_batch_as_its_stage_says(
    schedule: str, stage: int, gathers: tuple[int, int, int, int]
) -> None:
    config, readings = pipeline_of_2(schedule, stage)
    part = partial(part_of, config, tp=1, shard=8)
    blocks = part(layers=2, embed=False, head=False)
    ends = (part(layers=0, head=False), part(layers=0, embed=False))
    for reading, end, of_block, of_end in zip(readings, ends, gathers[::2], gathers[1::2], strict=True):
        assert reading.table["dp_shard", "all_gather"] == (
            2 * of_block + of_end,
            BF16 * (of_block * blocks + of_end * end),
        )
        assert reading.table["dp_shard", "reduce_scatter"] == (4 * 3, 4 * 4 * (blocks + end))
        assert reading.table["dp_replicate", "all_reduce"] == (3, 4 * (blocks + end) // 8)


@pytest.mark.slow
def test_a_pass_for_weights_frees_each_block_while_the_next_is_gathered() -> None:
    sent = [item.kind for window in pipeline_of_2("zero_bubble", 3)[1][1].windows for item in window.collectives
            if item.axis == "dp_shard"]  # fmt: skip
    gather, reduce = "all_gather", "reduce_scatter"
    assert sent[-6:] == [gather, gather, reduce, gather, reduce, reduce]


@pytest.mark.slow
def test_a_pipeline_holds_what_its_stage_says() -> None:
    small = 512 * 30 * 4  # each tensor is rounded up to 512 bytes
    for stage in (1, 2, 3):
        config, (first, _) = pipeline_of_2("1f1b", stage)
        part = partial(part_of, config, tp=1, shard=8, head=False)
        numbers = part(layers=2)
        # The peak is in the backward pass of the last block, which stage 3 alone has gathered then.
        gathered = part(layers=1, embed=False) if stage == 3 else numbers
        assert first.at_peak["parameters"] == pytest.approx(2 * (numbers / 8 + gathered), abs=small), stage
        kept = numbers if stage == 1 else numbers / 8
        assert first.at_peak["gradients"] == pytest.approx(4 * kept, abs=2 * small), stage


def test_a_micro_batch_that_reduces_once_too_often_is_seen() -> None:
    def always(model: Any, _zero_stage: int, *, last: bool) -> None:
        model.set_requires_gradient_sync(True)
        model.set_reshard_after_backward(last)

    with mock.patch("parallel.engine.set_gradient_sync", always):
        config, (reading,) = read("parallel=hybrid_zero")
    expected = table(Sizes(config, 8), 8, gathers=(1, 1), scatters=1)
    assert reading.table != expected
    assert reading.table["dp_shard", "reduce_scatter"] == tuple(
        MICRO_BATCHES * figure for figure in expected["dp_shard", "reduce_scatter"]
    )


@pytest.mark.slow
def test_a_long_step_is_as_its_micro_batches_say() -> None:
    config = configure("parallel=hybrid_zero", "parallel.zero_stage=3")
    run = dry_run(config)
    short, long = run.read_rank(0, 6), run.read(6)[0]
    assert (long.table, long.flops) == (short.table, short.flops)
    assert long.time.total_s == pytest.approx(short.time.total_s, rel=1e-6)


def test_memory_is_what_each_kind_takes() -> None:
    config, (alone,) = read(world_size=1)
    numbers = count_params(config.model)
    assert sum(alone.at_peak.values()) == pytest.approx(alone.peak, rel=1e-3), "every byte is of some kind"
    small = 512 * 30 * LAYERS  # each tensor is rounded up to 512 bytes
    assert alone.at_peak["parameters"] == pytest.approx(2 * numbers, abs=small)
    # the lower halves of the masters, and two fp32 moments
    assert alone.at_peak["optimizer"] == pytest.approx(10 * numbers, abs=3 * small)
    assert alone.at_peak["gradients"] == pytest.approx(2 * numbers, abs=small)
    _, (sharded,) = read("parallel=zero1", "parallel.reduce_dtype=bf16", world_size=8)
    assert sharded.at_peak["optimizer"] == pytest.approx(10 * numbers / 8, abs=3 * small)
    assert sharded.at_peak["parameters"] == pytest.approx(2 * numbers * (1 + 1 / 8), abs=2 * small)
    assert sharded.at_peak["activations"] == pytest.approx(alone.at_peak["activations"], rel=0.02)


def test_weights_that_are_gathered_in_8_bits_take_a_byte_and_are_not_kept_turned_beside() -> None:
    _, (alone,) = read("precision=fp8", world_size=1)
    config, (sharded,) = read("parallel=zero1", "precision=fp8", "parallel.reduce_dtype=bf16", world_size=8)
    sizes, numbers, small = Sizes(config, 8), count_params(config.model), 512 * 30 * LAYERS
    assert sharded.at_peak["parameters"] == pytest.approx(2 * numbers * (1 + 1 / 8) - sizes.in_8_bits, abs=2 * small)
    kept = alone.at_peak["activations"] - sharded.at_peak["activations"]
    assert kept == pytest.approx(sizes.in_8_bits, rel=0.05)


@pytest.mark.parametrize(("overrides", "world_size"), [([], 1), (["parallel=zero1", "precision=fp8"], 8)], ids=str)
def test_flops_are_those_of_the_model(overrides: list[str], world_size: int) -> None:
    config, (reading,) = read(*overrides, world_size=world_size)
    model, tokens = config.model, MICRO_BATCHES * 4096
    # A token sees half of the others: 2 products forward and, because a fused kernel makes the scores again, 5 backward.
    kv_dim = model.n_kv_heads * model.head_dim
    layer = 2 * model.d_model * (model.d_model + kv_dim) + 3 * model.d_model * model.d_ff
    products = 6 * (model.n_layers * layer + model.vocab_size * model.d_model)
    attention = 7 * model.n_layers * model.d_model * config.data.seq_len
    assert reading.flops == tokens * (products + attention)


def test_the_command_prints_a_dry_run(tmp_path: Path) -> None:
    command = [sys.executable, "train.py", "dry_run=true", "parallel=hybrid_zero", "dry_run.world_size=1024"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in ("1,024 GPUs", "dp_shard 8", "parameters held; peak", "reduce_scatter", "tokens/s a GPU", "overlap"):
        assert words in done.stdout
