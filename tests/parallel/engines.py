"""Small engines, and packed micro-batches of random tokens for them."""

import torch

from data.batches import Batch
from parallel.engine import Engine, LossScaler
from parallel.parallelize import ParallelModel
from training.config import Dtype, LossConfig, OptimizerConfig, PrecisionConfig, Reduction
from training.optim.optimizer import Optimizer

# A rounding error d of a gradient near 0 moves a weight by up to lr * d / eps: with the usual eps of 1e-8 that is a
# whole update where d decides the sign. These gradients are about 1e-3, and their rounding errors below 1e-9.
EPS = 1e-4


def engine_of(laid_out: ParallelModel, optimizer: OptimizerConfig, reduction: Reduction) -> Engine:
    """Initialize a model and return an engine for data of two sources."""
    laid_out.init_weights(seed=3)
    updates = Optimizer(laid_out.module, optimizer, laid_out.params)
    updates.set_schedule([(optimizer.lr, 0.95)] * 100)
    is_fp16 = next(laid_out.module.parameters()).dtype is torch.float16
    scaler = LossScaler(PrecisionConfig(compute=Dtype.fp16 if is_fp16 else Dtype.fp32))
    counts_3 = torch.zeros(3, dtype=torch.int64, device=laid_out.mesh.device)
    loss, sources = (
        LossConfig(chunk_tokens=5, reduction=reduction),
        {"n_sources": 2, "bytes_per_token": torch.arange(64)},
    )
    return Engine(laid_out, updates, scaler, counts_3, loss=loss, max_grad_norm=optimizer.max_grad_norm, **sources)


def micro_batch(lengths: list[int], seed: int, *, ignored: int = 1, source: int = 0) -> Batch:
    """Return one row of segments of these lengths; its first `ignored` tokens have no target."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    tokens_BT, labels_BT = torch.randint(0, 64, (2, 1, total), generator=generator, dtype=torch.int32)
    labels_BT[:, :ignored] = -100
    return Batch(
        tokens_BT=tokens_BT,
        labels_BT=labels_BT,
        positions_BT=torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])[None],
        source_BT=torch.full((1, total), source, dtype=torch.int32),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seq_len=max(lengths),
    )
