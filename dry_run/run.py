"""A run on ranks and GPUs that are not there: what `dry_run=true` prints."""

from functools import partial

from conf.schema import TrainConfig
from dry_run.reading import DryRun, FakeBatch, report
from model.config import Attention
from parallel.engine import Engine
from parallel.loss_scaler import LossScaler
from parallel.mesh import Mesh
from training.optim.optimizer import build_optimizer
from training.setup import build_engine, build_model, lr_schedule
from training.state import TrainState


def run_dry_run(config: TrainConfig) -> None:
    """Print what a step would be on `dry_run.world_size` GPUs, from the code that would run it."""
    model = config.model
    for line in report(
        dry_run(config),
        name=model.name,
        n_params=model.n_params,
        global_batch_tokens=config.global_batch_tokens,
        micro_batch_tokens=config.micro_batch_tokens,
    ):
        print(line)


def dry_run(config: TrainConfig) -> DryRun:
    """Join model, optimizer and engine for ranks and GPUs that are not there."""

    def build(mesh: Mesh) -> Engine:
        model, stages = build_model(config, mesh)
        optimizer = build_optimizer(model, config.optimizer, tied_params=model.tied_params)
        state = TrainState(device=mesh.device)
        optimizer.set_schedule(lr_schedule(config, state)[:1])
        return build_engine(config, mesh, model, stages, optimizer, LossScaler(config.precision), state)

    if config.model.attention is not Attention.reference:
        config.model.attention = Attention.sdpa  # keeps what every fused kernel keeps, and can be run without one
    config.parallel.cuda_graphs = False  # which change when kernels are launched, and none is
    data = config.data
    batch = partial(FakeBatch.of, config.micro_batch_tokens // data.pack_tokens, data.pack_tokens, data.seq_len)
    kernels = ("model.loss_kernel", "training.optim.adamw_kernel")
    return DryRun(build, batch, config.parallel, config.dry_run, kernels=kernels)
