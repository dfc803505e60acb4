"""torchtitan's Llama on several GPUs with `parallelize_llama`, for benchmarks.multi_gpu."""

import importlib.machinery
import sys
from contextlib import nullcontext
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F

SHAPES = {
    "1b": {"dim": 2048, "n_layers": 24, "n_heads": 16, "n_kv_heads": 16, "vocab_size": 32768, "multiple_of": 256},
    "7b": {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "vocab_size": 103168, "multiple_of": 256},
}


def _fake_missing(*names: str) -> None:
    """Mock missing packages that torchtitan imports for its data loader, which is not used here."""
    for name in names:
        try:
            __import__(name)
        except ImportError:
            module: Any = MagicMock() if name == "tyro" else ModuleType(name)
            module.__path__, module.__spec__ = [], importlib.machinery.ModuleSpec(name, None)
            if name != "tyro":  # attributes of the others are subclassed
                module.__getattr__ = _empty_class
            sys.modules[name] = module


def _empty_class(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def measure(
    model: tuple[str, ...], seq_len: int, rows: int, micro_batches: int, seconds: float, reshard: str, tp: str,
    cp: str = "1",
) -> dict[str, float]:  # fmt: skip
    """Return tokens/s per GPU, milliseconds and GiB of a step."""
    import torch.distributed as dist
    from torch.distributed.tensor.parallel import loss_parallel

    from benchmarks.multi_gpu import timed
    from parallel.config import ParallelConfig
    from parallel.mesh import distributed

    data_loading = ("datasets", "datasets.distributed", "torchdata", "torchdata.stateful_dataloader", "torchdata.nodes")
    _fake_missing(*data_loading, "tyro", "tomli", "torchdata.stateful_dataloader.worker")
    from torchtitan.config import JobConfig  # type: ignore[import-not-found]
    from torchtitan.distributed import ParallelDims  # type: ignore[import-not-found]
    from torchtitan.distributed.context_parallel import (  # type: ignore[import-not-found]
        prepare_context_parallel_input,
    )
    from torchtitan.distributed.utils import clip_grad_norm_  # type: ignore[import-not-found]
    from torchtitan.models.llama3 import Transformer, TransformerModelArgs  # type: ignore[import-not-found]
    from torchtitan.models.llama3.infra.parallelize import parallelize_llama  # type: ignore[import-not-found]

    with distributed(ParallelConfig(dp_replicate=-1)) as mesh:
        n_gpus, device = mesh.world_size, mesh.device
        dp = n_gpus // (int(tp) * int(cp))
        job = JobConfig()
        job.training.seq_len, job.compile.enable, job.activation_checkpoint.mode = seq_len, True, "none"
        job.parallelism.fsdp_reshard_after_forward = reshard
        dims = ParallelDims(dp_replicate=1, dp_shard=dp, cp=int(cp), tp=int(tp), pp=1, ep=1, etp=1, world_size=n_gpus)
        if hasattr(dims, "build_mesh"):
            dims.build_mesh()
        overrides = dict(setting.split("=") for setting in model)
        shape = SHAPES[overrides["model"]].copy()
        shape["n_layers"] = int(overrides.get("model.n_layers", shape["n_layers"]))
        arguments = TransformerModelArgs(**shape, ffn_dim_multiplier=None, rope_theta=10000, max_seq_len=seq_len)
        torch._dynamo.reset()  # the layers of another row
        # torchtitan computes in bf16 under FSDP only; else its parameters must be bf16
        torch.set_default_dtype(torch.float32 if dp * int(cp) > 1 else torch.bfloat16)
        with torch.device("meta"):
            module = Transformer(arguments)
        torch.set_default_dtype(torch.float32)
        module = parallelize_llama(module, dims, job)
        module.to_empty(device=device)
        with torch.no_grad():
            module.init_weights(buffer_device=device)
        params = list(module.parameters())
        optimizer = torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        losses: list[Any] = [torch.compile(_loss)]
        random = torch.Generator().manual_seed(dist.get_rank() if dp > 1 else 0)

        def step() -> None:
            for _ in range(micro_batches):
                x = torch.randint(0, arguments.vocab_size, (rows, seq_len + 1), generator=random)
                x = x.to(device, non_blocking=True)
                inputs, labels, extra = x[:, :-1], x[:, 1:], {}
                if int(cp) > 1:
                    inputs, labels, extra = prepare_context_parallel_input(
                        inputs, labels, extra, dims.get_mesh("cp"), device
                    )
                with loss_parallel() if int(tp) > 1 else nullcontext():
                    (losses[-1](module(inputs, **extra), labels) / micro_batches).backward()
            clip_grad_norm_(params, 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        try:
            step()
        except (AttributeError, RuntimeError):  # a compiled loss may not support a split vocabulary
            losses.append(_loss)
        tokens = rows * seq_len * micro_batches * dp / n_gpus
        return timed(step, device, tokens, seconds, mesh.all_reduce_max)
