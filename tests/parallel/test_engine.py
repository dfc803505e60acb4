"""The engine's step against plain autograd and torch.optim on the whole batch at once."""

from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from data.batches import Batch
from model.transformer import Transformer
from parallel import async_tp, graphs
from parallel.config import ActivationCheckpointing, Compile, ParallelConfig, ParallelError
from parallel.engine import Engine, LossScaler
from parallel.mesh import Mesh
from parallel.parallelize import allocate, compile_blocks, parallelize, recomputed_blocks
from parallel.shards import matrices_first
from tests.models import small_model
from tests.parallel.packed import micro_batch
from training.config import Dtype, LossConfig, OptimizerConfig, PrecisionConfig, Reduction
from training.optim.optimizer import Optimizer
from training.setup import DTYPES

CONFIG = small_model(n_layers=3, d_ff=64, attention_bias=True)
# Dynamo's own, from inspecting the inputs of what it compiles
DYNAMO_WARNING = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
# A rounding error d of a gradient near 0 moves a weight by up to lr * d / eps: with the usual eps of 1e-8 that is a whole
# update where d decides the sign. These gradients are about 1e-3, and their rounding errors below 1e-9.
EPS = 1e-4
CPU, CUDA = Mesh(device=torch.device("cpu")), Mesh(device=torch.device("cuda", 0))


def build(
    *, parallel: ParallelConfig | None = None, optimizer: OptimizerConfig | None = None, compute: Dtype = Dtype.fp32,
    reduction: Reduction = Reduction.global_token, grad_dtype: torch.dtype | None = None, fp8: str = "none",
    mesh: Mesh = CPU,
) -> Engine:  # fmt: skip
    optimizer = optimizer or OptimizerConfig(lr=1e-2, eps=EPS)
    with torch.device("meta"):
        model = Transformer(CONFIG)
    layout, dtype = parallel or ParallelConfig(), DTYPES[compute.value]
    laid_out = parallelize(model, mesh, layout, dtype, fp8=fp8, grad_dtype=grad_dtype)
    laid_out.init_weights(seed=3)
    adamw = Optimizer(model, optimizer)
    adamw.set_schedule([(optimizer.lr, 0.95)] * 100)
    loss = LossConfig(chunk_tokens=16, reduction=reduction)
    scaler = LossScaler(PrecisionConfig(compute=compute))
    counts_3 = torch.zeros(3, dtype=torch.int64, device=mesh.device)
    sources = {"n_sources": 2, "bytes_per_token": torch.arange(64)}
    return Engine(laid_out, adamw, scaler, counts_3, loss=loss, max_grad_norm=optimizer.max_grad_norm, **sources)


def reference_losses(steps: list[list[Batch]], reduction: Reduction, max_norm: float) -> tuple[list, list, dict]:
    """Return losses, norms and weights of logits, F.cross_entropy, clip_grad_norm_ and torch.optim.AdamW."""
    model = Transformer(CONFIG)
    model.init_weights(seed=3)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=EPS)
    losses, norms = [], []
    for batches in steps:
        per_batch = []
        for b in batches:
            logits = model(b.tokens_BT, positions_BT=b.positions_BT, cu_seqlens=b.cu_seqlens, max_seq_len=b.max_seq_len)
            per_batch.append(F.cross_entropy(logits.flatten(0, 1), b.labels_BT.flatten().long(), reduction="none"))
        counts = [int((b.labels_BT != -100).sum()) for b in batches]
        if reduction is Reduction.global_token:
            loss = torch.cat(per_batch).sum() / sum(counts)
        else:
            loss = torch.stack([nll.sum() / n for nll, n in zip(per_batch, counts, strict=True)]).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms, model.state_dict()


@pytest.mark.parametrize("reduction", list(Reduction))
def test_accumulated_packed_clipped_steps_equal_plain_autograd(reduction: Reduction) -> None:
    steps = [
        [micro_batch([9, 7], 10 * s, ignored=5), micro_batch([16], 10 * s + 1), micro_batch([4, 4, 8], 10 * s + 2)]
        for s in range(6)
    ]
    engine = build(reduction=reduction, optimizer=OptimizerConfig(lr=1e-2, max_grad_norm=0.3, eps=EPS))
    results = [engine.train_step(batches) for batches in steps]
    losses, norms, weights = reference_losses(steps, reduction, 0.3)
    assert max(norms) > 0.3, "nothing was clipped"
    assert [float(r.loss) for r in results] == pytest.approx(losses, rel=2e-6)
    assert [float(r.grad_norm) for r in results] == pytest.approx(norms, rel=1e-5)
    for name, param in engine.model.named_parameters():
        torch.testing.assert_close(param.detach(), weights[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", list(ActivationCheckpointing))
def test_activation_checkpointing_changes_nothing_but_memory(mode: ActivationCheckpointing) -> None:
    plain, checkpointed = build(), build(parallel=ParallelConfig(activation_checkpointing=mode))
    batches = [micro_batch([9, 7], 0), micro_batch([16], 1)]
    calls: list[object] = []
    for block in checkpointed.model.get_submodule("blocks").children():
        block.get_submodule("mlp").register_forward_pre_hook(lambda *_: calls.append(None))
    for _ in range(3):
        one = plain.train_step(batches)
        other = checkpointed.train_step(batches)
        assert float(one.loss) == float(other.loss)
    for a, b in zip(plain.model.parameters(), checkpointed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    recomputed = recomputed_blocks(3, ParallelConfig(activation_checkpointing=mode))
    assert recomputed == {"none": 0, "selective": 0, "full": 3, "fraction": 2}[mode.value]
    partly = 3 if mode is ActivationCheckpointing.selective else 0
    assert len(calls) == 6 * (3 + recomputed + partly)


def test_selective_checkpointing_repeats_no_product() -> None:
    def products(mode: ActivationCheckpointing) -> int:
        engine = build(parallel=ParallelConfig(activation_checkpointing=mode))
        with FlopCounterMode(display=False) as counter:
            engine.train_step([micro_batch([9, 7], 0)])
        return counter.get_total_flops()

    none, selective, full = map(products, list(ActivationCheckpointing)[:3])
    assert none == selective < full


@DYNAMO_WARNING
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_all_blocks_and_packs_share_two_compiled_graphs(mode: str) -> None:
    plain, compiled = build(), build(parallel=ParallelConfig(activation_checkpointing=ActivationCheckpointing(mode)))
    compile_blocks(list(compiled.model.get_submodule("blocks").children()), backend="aot_eager")
    counters.clear()
    graphs = []
    for step in range(4):  # the number of documents and their lengths change, their sum does not
        batches = [micro_batch([9, 7], step), micro_batch([16], step + 10), micro_batch([3, 4 + step, 9 - step], step)]
        one, other = plain.train_step(batches), compiled.train_step(batches)
        assert float(one.loss) == pytest.approx(float(other.loss), rel=1e-5)
        assert float(one.grad_norm) == pytest.approx(float(other.grad_norm), rel=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [2] * 4 and not counters["graph_break"]


def test_grad_dtype_accumulates_in_fp32() -> None:
    batches = [micro_batch([16], seed) for seed in range(8)]
    exact, kept = build(), build(compute=Dtype.bf16, grad_dtype=torch.float32)
    expected, found = (float(engine.train_step(batches).grad_norm) for engine in (exact, kept))
    assert found == pytest.approx(expected, rel=1e-2)
    kept._run(batches[:1], [1.0], kept._no_sums())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in kept.model.parameters())


def test_fp8_and_cuda_graphs_need_a_gpu() -> None:
    with pytest.raises(ParallelError, match="precision.fp8"):
        build(compute=Dtype.bf16, fp8="tensorwise")
    with pytest.raises(ParallelError, match="parallel.cuda_graphs"):
        build(parallel=ParallelConfig(cuda_graphs=True))


def test_evaluate_returns_totals_by_source() -> None:
    engine = build()
    batches = [micro_batch([8], 0, source=0, ignored=3), micro_batch([8], 1, source=1)]
    totals = engine.evaluate(batches)
    for source, batch in enumerate(batches):
        labels = batch.labels_BT.flatten().long()
        logits = engine.model(batch.tokens_BT).flatten(0, 1).detach()
        nll = F.cross_entropy(logits, labels, reduction="sum")
        kept = labels[labels != -100]
        correct = (logits.argmax(-1) == labels).sum()
        expected = [float(nll), float(correct), len(kept), float(kept.sum())]
        assert totals[source].tolist() == pytest.approx(expected, rel=1e-5)


@DYNAMO_WARNING
@pytest.mark.parametrize("compiled", [False, True])
def test_nonfinite_step(compiled: bool) -> None:
    """Cases 40 and 41."""
    engine, batches = build(), [micro_batch([8], 0)]
    if compiled:
        compile_blocks(list(engine.model.get_submodule("blocks").children()), backend="aot_eager")
    weight = engine.model.get_parameter("blocks.1.mlp.w_up.weight").data
    good = weight.clone()
    weight.fill_(3e38)
    before = {name: tensor.clone() for name, tensor in engine.optimizer.state_tensors().items()}
    assert not engine.train_step(batches).finite
    for name, tensor in engine.optimizer.state_tensors().items():
        assert torch.equal(tensor, before[name]), name
    assert engine.find_nonfinite_module(batches) == "blocks.1.mlp.w_up (forward)"
    assert engine.counts_3.tolist() == [0, 1, 1]
    weight[0, 0] = float("nan")  # named before activations
    assert engine.find_nonfinite_module(batches) == "blocks.1.mlp.w_up.weight (weight)"
    weight.copy_(good)
    assert engine.train_step(batches).finite
    assert engine.counts_3.tolist() == [1, 1, 0]


def test_step_without_targets() -> None:
    engine = build(optimizer=OptimizerConfig(weight_decay=0.0))
    before = [p.detach().clone() for p in engine.model.parameters()]
    result = engine.train_step([micro_batch([8], 0, ignored=8)])
    assert (float(result.loss), float(result.grad_norm), bool(result.finite), result.n_targets) == (0.0, 0.0, True, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))


def test_fp16_scale_backs_off_until_gradients_are_finite() -> None:
    engine = build(compute=Dtype.fp16, optimizer=OptimizerConfig(lr=1e-3))
    engine.scaler.scale = 2.0**24
    batches = [micro_batch([16], 0)]
    finite = [bool(engine.train_step(batches).finite) for _ in range(30)]
    assert not finite[0] and finite[-1]
    assert engine.scaler.scale < 2.0**24


@pytest.mark.parametrize(
    ("mesh", "compute"), [(CPU, Dtype.bf16), (CPU, Dtype.fp16), pytest.param(CUDA, Dtype.bf16, marks=pytest.mark.gpu)]
)
def test_low_precision_learns_like_fp32(mesh: Mesh, compute: Dtype) -> None:
    batches = [micro_batch([16, 16], 0), micro_batch([32], 1)]
    optimizer = OptimizerConfig(lr=3e-3)
    exact, low = build(optimizer=optimizer), build(mesh=mesh, compute=compute, optimizer=optimizer)
    expected, losses = ([float(engine.train_step(batches).loss) for _ in range(15)] for engine in (exact, low))
    assert expected[-1] < expected[0] - 1.0
    assert losses == pytest.approx(expected, rel=2e-2)


def steps_of_packs() -> list[list[Batch]]:
    """Return steps of segments of many counts and lengths; those of the first two steps have one shape."""
    packs = ([9, 7], [16], [3, 4, 9], [8, 8], [1] * 16, [2, 1, 1, 5, 7])
    return [
        [micro_batch(packs[(s + i) % 6 if s > 1 else 0], 10 * s + i, source=i % 2) for i in range((4, 2, 3)[s % 3])]
        for s in range(14)
    ]


def compare_with_graphs(plain: Engine, graphed: Engine, steps: list[list[Batch]]) -> None:
    for number, batches in enumerate(steps):
        one, other = plain.train_step(batches), graphed.train_step(batches)
        for field in ("loss", "grad_norm", "finite", "rates_2", "totals_S4"):
            assert torch.equal(getattr(one, field), getattr(other, field)), f"{field} of step {number}"
        assert one.n_targets == other.n_targets and one.n_tokens == other.n_tokens
    for (name, a), b in zip(plain.model.named_parameters(), graphed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(plain.counts_3, graphed.counts_3)


class Replayed(graphs.Recorded):
    """A stand-in for CUDA graphs: a replay uses the gradients that were there at the capture."""

    params: ClassVar[list[torch.nn.Parameter]] = []
    captured: list[torch.Tensor | None] | None = None

    def __call__(self) -> None:
        current = [param.grad for param in self.params]
        captures = self.captured is None and self.warm and self.may_capture()
        for param, grad in zip(self.params, self.captured or (), strict=False):
            param.grad = param.grad if grad is None else grad
        super().__call__()
        if captures:
            self.captured = current
        elif self.captured is not None:
            for param, grad in zip(self.params, current, strict=True):
                param.grad = grad


@pytest.mark.parametrize("recorded", [graphs.Recorded, Replayed])
def test_fixed_micro_batch_memory_gives_the_same_steps(monkeypatch: pytest.MonkeyPatch, recorded: type) -> None:
    monkeypatch.setattr(graphs, "Recorded", recorded)
    plain, graphed = build(), build()
    monkeypatch.setattr(Replayed, "params", list(graphed.model.parameters()))
    graphed.graphs = graphed.graphs_on(None)
    bad, steps = [micro_batch([8], 0)], steps_of_packs()
    for engine in (plain, graphed):
        block = engine.model.get_submodule("blocks.1.mlp.w_up")
        handle = block.register_forward_hook(lambda _m, _i, out: out.mul(float("inf")))
        assert not engine.train_step(bad).finite
        assert engine.find_nonfinite_module(bad) == "blocks.1.mlp.w_up (forward)"
        handle.remove()
    steps[4] = [micro_batch([16], 0, ignored=16)]  # without a single target
    compare_with_graphs(plain, graphed, steps)
    shapes = sorted({key[2:4] for key in graphed.graphs.passes})
    assert shapes == [(1, 8), (1, 16), (2, 8), (2, 16), (4, 16), (8, 16), (16, 1)]


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Sum the embedding's gradient and the totals by source in a fixed order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(
    ("mode", "compiled", "fp8"),
    [
        *((mode, Compile.none, "none") for mode in ActivationCheckpointing),
        (ActivationCheckpointing.none, Compile.none, "tensorwise"),
        (ActivationCheckpointing.none, Compile.blocks, "none"),
    ],
)
def test_cuda_graphs_give_the_same_steps(mode: ActivationCheckpointing, compiled: Compile, fp8: str) -> None:
    layouts = [ParallelConfig(activation_checkpointing=mode, compile=compiled, cuda_graphs=on) for on in (False, True)]
    plain, graphed = (build(mesh=CUDA, compute=Dtype.bf16, fp8=fp8, parallel=layout) for layout in layouts)
    compare_with_graphs(plain, graphed, steps_of_packs())
    assert graphed.graphs is not None and graphed.graphs.update.graph is not None
    assert all(passes.graph is not None for *_, passes in graphed.graphs.passes.values())
    counters.clear()
    compare_with_graphs(plain, graphed, steps_of_packs())
    assert not counters["stats"]["unique_graphs"]


@pytest.mark.gpu
def test_step_does_not_wait_for_the_device() -> None:
    engine = build(mesh=CUDA, compute=Dtype.bf16)
    batches = [micro_batch([16, 16], 0), micro_batch([32], 1)]
    for field in ("tokens_BT", "labels_BT", "positions_BT", "source_BT", "cu_seqlens"):
        for batch in batches:
            setattr(batch, field, getattr(batch, field).pin_memory())
    engine.train_step(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        done = [engine.train_step(batches) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(step.finite) for step in done)


def test_weights_of_one_input_are_joined_without_a_copy() -> None:
    module = torch.nn.ModuleList(torch.nn.Linear(8, rows) for rows in (8, 4, 4))
    allocate(module, torch.float32, torch.device("cpu"))
    for param in module.parameters():
        torch.nn.init.normal_(param)
    weights = [layer.weight.detach() for layer in module]  # type: ignore[union-attr]
    joined = async_tp.join(weights)
    assert joined.data_ptr() == weights[0].data_ptr()
    assert torch.equal(joined, torch.cat(weights))
    assert [name.split(".")[1] for name, _ in matrices_first(module)] == ["weight"] * 3 + ["bias"] * 3
    apart = [torch.randn(3, 8), torch.randn(2, 8)]
    assert torch.equal(async_tp.join(apart), torch.cat(apart))
