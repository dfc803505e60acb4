"""Collectives, memory and FLOPs of dry runs equal the closed forms of their layouts, on up to 1,024 fake GPUs."""

import sys
from copy import deepcopy
from functools import cache

import pytest

from benchmarks.multi_gpu import ROWS, settings
from benchmarks.node import predict
from conf.schema import TrainConfig
from dry_run.fake_gpu import TRITON_KERNELS
from dry_run.run import run_dry_run
from dry_run.step_profile import StepProfile, profile_rank, profile_step
from model.counts import count_params
from parallel.config import ReduceDtype
from parallel.shards import ALIGNMENT
from tests.conftest import composed

WORLD, MICRO_BATCHES, LAYERS = 1024, 2, 2
BF16 = 2
PLAIN = "parallel.compile=none"  # which changes neither collectives nor what ZeRO holds, and is faster


def configure(*overrides: str, world_size: int = WORLD) -> TrainConfig:
    """Compose InternLM-7B with fewer layers and micro-batches of 4,096 tokens."""
    return composed(
        "dry_run='true'", f"dry_run.world_size={world_size}", "model=7b", f"model.n_layers={LAYERS}", "data=random",
        "data.seq_len=2048", "data.micro_batch_size=2", *overrides,
    )  # fmt: skip


@cache
def profile(
    *overrides: str, world_size: int = WORLD, micro_batches: int = MICRO_BATCHES
) -> tuple[TrainConfig, StepProfile]:
    """Profile the first rank's step."""
    config = configure(*overrides, world_size=world_size)
    return config, profile_rank(config, 0, micro_batches)


Shapes = list[tuple[int, int]]  # of a unit's parameters, a tp rank's part: rows, numbers per row


def units_of(config: TrainConfig, *, tp: int = 1, embed: bool = True, head: bool = True) -> list[Shapes]:
    """Return what is gathered and reduced together: the embedding, each block, norm and head."""
    width, d_ff, vocab = config.model.d_model, config.model.d_ff // tp, config.model.vocab_size // tp
    attention = [*[(width // tp, width), (width // tp, 1)] * 3, (width, width // tp), (width, 1)]
    block = [*attention, *[(d_ff, width)] * 2, (width, d_ff), *[(width, 1)] * 2]
    ends = [[(vocab, width)]] * embed, [[(width, 1), (vocab, width)]] * head
    return [*ends[0], *[block] * config.model.n_layers, *ends[1]]


def padded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def gathered(units: list[Shapes], shards: int) -> int:
    """Return the numbers of whole units; rows are padded until they divide."""
    return sum(padded(rows, shards) * columns for unit in units for rows, columns in unit)


def packed(units: list[Shapes], shards: int) -> int:
    """Return the numbers of the units' gradients, in which a rank's share of each parameter is aligned too."""
    shares = [padded(rows, shards) // shards * columns for unit in units for rows, columns in unit]
    return shards * sum(padded(share, ALIGNMENT) for share in shares)


def metric_bytes(dp: int, micro_batches: int = MICRO_BATCHES) -> int:
    """Bytes that each step reduces over all ranks: targets per micro-batch; loss, four sums per source, norm."""
    return 8 * dp * micro_batches + 8 * 6


def gathers_of(units: list[Shapes], shards: int, zero_stage: int, micro_batches: int) -> tuple[int, int]:
    """Return count and bytes of gathers per step."""
    if zero_stage == 3:
        # In each forward pass, and every block but the last again in the backward pass, which begins with that one;
        # the first two stay gathered from the first micro-batch to the forward pass of the last one.
        units = [*units, *(units[2:] + units[2:-2]) * (micro_batches - 1), *units[1:-2]]
    return len(units), BF16 * gathered(units, shards)


def messages_of(units: list[Shapes], shards: int) -> int:
    """Return how many messages gradients take that are sent as they are computed: pieces no larger than a block."""
    largest = max(packed([unit], shards) for unit in units if len(unit) > 2)
    return sum(-(-packed([unit], shards) // largest) for unit in units)


# Shards, ZeRO stage, micro-batches; how, how often and in how many bytes per number a unit's gradients are sent.
SENT = [
    (["parallel=ddp"], (1, 0, 2), ("", 0, 0)),
    (["parallel=zero1"], (WORLD, 1, 2), ("reduce_scatter", 1, 4)),
    (["parallel=hybrid_zero"], (8, 1, 1), ("all_to_all", 1, 2)),  # as computed, for there is nothing to add
    (["parallel=hybrid_zero", "parallel.reduce_dtype=bf16"], (8, 1, 2), ("all_to_all", 1, 2)),
    (["parallel=hybrid_zero", "parallel.zero_stage=2"], (8, 2, 2), ("all_to_all", 2, 2)),
    (["parallel=zero3"], (WORLD, 3, 2), ("reduce_scatter", 2, 4)),
]


def data_parallel_collectives(
    config: TrainConfig, layout: tuple[int, int, int], sent: tuple[str, int, int]
) -> dict[tuple[str, str], tuple[int, int]]:
    """Return the closed form of a row of `SENT`."""
    (shards, zero_stage, micro_batches), (kind, times, sent_bytes) = layout, sent
    units, replicas = units_of(config), WORLD // shards
    numbers, reduced_bytes = packed(units, shards), 2 if config.parallel.reduce_dtype is ReduceDtype.bf16 else 4
    dp = "+".join(name for name, size in (("dp_replicate", replicas), ("dp_shard", shards)) if size > 1)
    expected = {}
    n_messages = len(units) if zero_stage < 2 and micro_batches > 1 else messages_of(units, shards)
    if replicas > 1:
        expected["dp_replicate", "all_reduce"] = (n_messages, reduced_bytes * numbers // shards)
    if shards > 1:
        expected["dp_shard", "all_gather"] = gathers_of(units, shards, zero_stage, micro_batches)
        expected["dp_shard", kind] = (times * n_messages, times * sent_bytes * numbers)
    count, n_bytes = expected.get((dp, "all_reduce"), (0, 0))
    expected[dp, "all_reduce"] = (count + 2, n_bytes + metric_bytes(WORLD, micro_batches))
    return expected


@pytest.mark.parametrize(("overrides", "layout", "sent"), SENT, ids=str)
def test_dp_collectives_on_1024(overrides: list[str], layout: tuple[int, int, int], sent: tuple[str, int, int]) -> None:
    config, found = profile(*overrides, PLAIN, micro_batches=layout[2])
    assert found.collectives == data_parallel_collectives(config, layout, sent)


def test_tensor_parallel_collectives_carry_activations_and_no_logits() -> None:
    tp, shards = 2, WORLD // 2
    config, found = profile("parallel=tp_zero1", PLAIN)
    tokens, width, units = 4096, config.model.d_model, units_of(config, tp=tp)
    # Attention, MLP, embedding and head each send whole activations once forward and once backward.
    sent = MICRO_BATCHES * (4 * LAYERS + 2)
    loss = (3 * MICRO_BATCHES, 5 * 4 * tokens * MICRO_BATCHES)  # largest logit; three sums; the first of the largest
    partial_grads = 4 * (3 * LAYERS + 1) * width // shards  # of norms and row-wise biases
    assert found.collectives == {
        ("dp_shard", "all_gather"): gathers_of(units, shards, 1, MICRO_BATCHES),
        ("dp_shard", "reduce_scatter"): (len(units), 4 * packed(units, shards)),
        ("dp_shard+tp", "all_reduce"): (2, metric_bytes(WORLD // tp)),
        ("tp", "all_gather"): (sent, sent * BF16 * tokens * width),
        ("tp", "all_reduce"): (loss[0] + 1, loss[1] + partial_grads),
        ("tp", "reduce_scatter"): (sent, sent * BF16 * tokens * width),
    }


def test_context_parallel_collectives() -> None:
    config, found = profile("parallel=cp", PLAIN)
    # of every layer q, k and v in one message and the output in another, forward and backward, half of the tokens here
    count, numbers = 4 * LAYERS * MICRO_BATCHES, 8 * LAYERS * MICRO_BATCHES * 4096 // 2 * config.model.d_model
    assert found.collectives["cp", "all_to_all"] == (count, BF16 * numbers)
    units = units_of(config)
    assert found.collectives["dp_shard+cp", "reduce_scatter"] == (len(units), 4 * packed(units, WORLD))


@cache
def pipeline_of_2() -> tuple[TrainConfig, list[StepProfile]]:
    config = configure("parallel=hybrid_zero", "parallel.pp=2", "parallel.zero_stage=3", "model.n_layers=4")
    return config, profile_step(config, 4)


def stages_of(config: TrainConfig) -> tuple[list[Shapes], list[Shapes]]:
    """Return the units of two pipeline stages."""
    units = units_of(config)
    return units[: len(units) // 2], units[len(units) // 2 :]


@pytest.mark.slow
def test_pipeline_collectives() -> None:
    config, profiles = pipeline_of_2()
    assert [found.rank for found in profiles] == [0, WORLD // 2]
    # How often a step gathers the embedding and two blocks of the first stage; two blocks and the head of the second.
    # From the first backward pass on to the last one the first two stay gathered.
    gathers = (3, 3, 8), (2, 1, 4)
    for found, units, times in zip(profiles, stages_of(config), gathers, strict=True):
        its = [unit for unit, count in zip(units, times, strict=True) for _ in range(count)]
        assert found.collectives["dp_shard", "all_gather"] == (len(its), BF16 * gathered(its, 8))
        numbers = packed(units, 8)
        assert found.collectives["dp_shard", "all_to_all"] == (4 * messages_of(units, 8), 4 * BF16 * numbers)
        assert found.collectives["dp_replicate", "all_reduce"] == (messages_of(units, 8), 4 * numbers // 8)
        for kind in ("send", "recv"):
            assert 0 <= found.collectives["pp", kind][1] - 4 * BF16 * 4096 * config.model.d_model <= 8


@pytest.mark.slow
def test_pipeline_memory() -> None:
    config, (first, _) = pipeline_of_2()
    units, numbers = stages_of(config)[0], gathered(stages_of(config)[0], 8)
    small = 512 * 30 * 4  # each tensor is rounded up to 512 bytes
    # The peak is in the backward pass of the last block, beside what stays gathered for the next micro-batch.
    held = numbers / 8 + numbers
    assert first.bytes_at_peak["parameters"] == pytest.approx(2 * held, abs=small)
    # Sums of its shards, and three places as large as a block where gradients are sent from
    kept = 4 * numbers / 8 + 2 * packed([units[1]] * 3, 8)
    assert first.bytes_at_peak["gradients"] == pytest.approx(kept, abs=small)


def test_extrapolated_step_equals_a_full_one() -> None:
    config = configure("parallel=hybrid_zero", "parallel.zero_stage=3", "model.n_layers=1", PLAIN)
    full, extrapolated = profile_rank(config, 0, 6), profile_step(config, 6)[0]
    assert (extrapolated.collectives, extrapolated.flops) == (full.collectives, full.flops)
    assert extrapolated.time.total_s == pytest.approx(full.time.total_s, rel=1e-6)


def test_memory_by_kind() -> None:
    config, alone = profile(world_size=1)
    numbers = count_params(config.model)
    small = 512 * 30 * LAYERS  # each tensor is rounded up to 512 bytes
    assert alone.bytes_at_peak["parameters"] == pytest.approx(2 * numbers, abs=small)
    # the lower 16 bits of the masters, and two fp32 moments
    assert alone.bytes_at_peak["optimizer"] == pytest.approx(10 * numbers, abs=3 * small)
    assert alone.bytes_at_peak["gradients"] == pytest.approx(2 * numbers, abs=small)
    _, sharded = profile("parallel=zero1", "parallel.reduce_dtype=bf16", world_size=8)
    assert sharded.bytes_at_peak["optimizer"] == pytest.approx(10 * numbers / 8, abs=3 * small)
    for kind in ("parameters", "gradients"):  # a rank's shard of the parameters lies within the whole
        assert sharded.bytes_at_peak[kind] == pytest.approx(2 * numbers, abs=small)
    assert sharded.bytes_at_peak["activations"] == pytest.approx(alone.bytes_at_peak["activations"], rel=0.02)
    for found in (alone, sharded):
        assert sum(found.bytes_at_peak.values()) == found.peak_bytes


@pytest.mark.parametrize(
    ("overrides", "ranks", "micro_batches", "kept"), [([], 1, 1, 2), (["parallel=zero1"], 8, 3, 4 / 8)], ids=str
)
def test_cuda_graphs_keep_gradients(overrides: list[str], ranks: int, micro_batches: int, kept: float) -> None:
    """They keep bf16 gradients, or under ZeRO fp32 sums over ranks, which else are not there at the peak."""
    sizes = {"world_size": ranks, "micro_batches": micro_batches}
    _, without = profile(*overrides, **sizes)
    config, graphs = profile(*overrides, "parallel.cuda_graphs=true", **sizes)
    assert graphs.peak_bytes - without.peak_bytes == pytest.approx(kept * count_params(config.model), rel=1e-3)


def block_flops(config: TrainConfig) -> tuple[int, int]:
    """Return the FLOPs per token of one product with each matrix of the blocks, and of one causal attention product."""
    model = config.model
    kv_dim = model.n_kv_heads * model.head_dim
    matrices = 2 * model.d_model * (model.d_model + kv_dim) + 3 * model.d_model * model.d_ff
    return 2 * model.n_layers * matrices, model.n_layers * model.d_model * config.data.seq_len


@pytest.mark.parametrize("overrides", [[], ["precision=fp8", "model.n_layers=1"]], ids=str)
def test_flops_equal_the_closed_form(overrides: list[str]) -> None:
    config, found = profile(*overrides, world_size=1)
    matrices, attention = block_flops(config)
    head = 2 * config.model.vocab_size * config.model.d_model
    # Of attention 2 products forward and, because a fused kernel recomputes the scores, 5 backward
    assert found.flops == MICRO_BATCHES * 4096 * (3 * (matrices + head) + 7 * attention)


def test_flops_of_muon() -> None:
    config, plain = profile(PLAIN, world_size=1)
    _, muon = profile("optimizer=muon", PLAIN, world_size=1)
    d, n = config.model.d_model, config.model.d_ff
    # Per matrix (n, d) with d <= n, five steps of two products with both sizes and one of d alone
    matrices = {(d, d): 4, (d, n): 3}
    expected = LAYERS * sum(count * 5 * (4 * d**2 * n + 2 * d**3) for (d, n), count in matrices.items())
    assert muon.flops - plain.flops == expected
    in_blocks = count_params(config.model) - (2 * config.model.vocab_size + 1) * d
    saved = plain.bytes_at_peak["optimizer"] - muon.bytes_at_peak["optimizer"]
    assert saved == pytest.approx(4 * in_blocks, rel=1e-3), "one fp32 moment instead of two"


def test_muon_exchanges_whole_matrices_in_two_messages() -> None:
    plain, muon = (profile(f"optimizer={rule}", "parallel=zero1", PLAIN, world_size=8)[1] for rule in ("adamw", "muon"))
    more = {key: count - plain.collectives.get(key, (0, 0))[0] for key, (count, _) in muon.collectives.items()}
    assert {key: count for key, count in more.items() if count} == {("dp_shard", "all_to_all"): 2}


def test_recomputed_blocks_cost_a_forward_pass_and_save_activations() -> None:
    config, kept = profile(world_size=1)
    _, recomputed = profile("parallel.activation_checkpointing=full", world_size=1)
    matrices, attention = block_flops(config)
    assert recomputed.flops - kept.flops == MICRO_BATCHES * 4096 * (matrices + 2 * attention)
    assert recomputed.bytes_at_peak["activations"] < kept.bytes_at_peak["activations"]
    assert recomputed.collectives == kept.collectives


def test_selective_checkpointing_saves_activations_without_repeating_products() -> None:
    (config, kept), (_, selective) = (
        profile(f"parallel.activation_checkpointing={mode}", world_size=1) for mode in ("none", "selective")
    )
    assert selective.flops == kept.flops and selective.collectives == kept.collectives
    numbers = 4096 * LAYERS * (2 * config.model.d_model + config.model.d_ff)  # both norms and the input of w_down
    saved = kept.bytes_at_peak["activations"] - selective.bytes_at_peak["activations"]
    assert saved == pytest.approx(BF16 * numbers, rel=1e-3)


# tokens/s per GPU on two H200; tp_7b in another call and with settings of its own
READ = {
    "zero1": 59_966, "zero1_x4": 62_082, "zero3": 59_577, "zero3_x4": 60_817, "zero3_7b": 27_109, "tp": 45_243,
    "tp_7b": 28_782, "cp": 26_890, "pp": 56_851, "zero1_7b_fp8": 41_776,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("row", READ)
def test_estimated_rates_are_within_a_tenth_of_those_read(row: str) -> None:
    """`python -m benchmarks.multi_gpu`."""
    more = ("parallel.async_tp=true",) if row == "tp_7b" else ()
    overrides, _ = settings(ROWS[row], 2, more)
    assert predict(tuple(overrides), 2)["predicted"] == pytest.approx(READ[row], rel=0.1)


def test_report_changes_no_configuration_and_leaves_no_fake_modules(capsys: pytest.CaptureFixture[str]) -> None:
    config = configure("parallel=hybrid_zero", "model.n_layers=1", "global_batch_tokens=4_194_304", PLAIN)
    before = deepcopy(config)
    run_dry_run(config)
    assert config == before
    assert not set(TRITON_KERNELS) & set(sys.modules)
    printed = capsys.readouterr().out
    for words in ("1,024 GPUs", "dp_shard 8", "parameters held; peak", "all_to_all", "tokens/s per GPU", "overlap"):
        assert words in printed
