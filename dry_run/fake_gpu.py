"""Fake ranks and GPUs: tensors have no storage, kernels and collectives do nothing, and code takes its GPU branches."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from parallel.axes import resolve_axes
from parallel.config import ParallelConfig
from parallel.mesh import Mesh, leave, open_mesh

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
TRITON_KERNELS = ("model.loss_kernel", "training.optim.adamw_kernel")
IS_CUDA, DEVICE = torch.Tensor.is_cuda.__get__, torch.Tensor.device.__get__  # type: ignore[attr-defined]
FAKE_DEVICE: Any = FakeTensor.device.fget


@contextmanager
def fake_mesh(layout: ParallelConfig, rank: int, world_size: int) -> Iterator[Mesh]:
    """Open the mesh of one rank, with collectives that do nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        mesh = open_mesh(resolve_axes(layout, world_size), zero_stage=layout.zero_stage, device=CPU)
        yield replace(mesh, device=CUDA)
    finally:
        leave()


@contextmanager
def fake_gpu(on_launch: Callable[[tuple[Any, ...]], object]) -> Iterator[None]:
    """Create tensors without storage that this project's code sees on a GPU.

    Torch's code sees them on the CPU, so that it runs without a GPU. `on_launch` gets the arguments of Triton kernels.
    """
    with ExitStack() as stack:
        _fake_triton(stack, on_launch)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        patches: list[tuple[Any, str, Any]] = [
            (FakeTensor, "device", property(_device)),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            *((torch.cuda, name, mock.MagicMock()) for name in ("Stream", "current_stream")),
            (DeviceMesh, "mesh", property(_without_modes(DeviceMesh.mesh.fget))),
            (DeviceMesh, "__getitem__", _without_modes(DeviceMesh.__getitem__)),
        ]
        for target, name, fake in patches:
            stack.enter_context(mock.patch.object(target, name, fake))
        stack.enter_context(_HostReads())
        stack.enter_context(_OnGpu())
        yield


def _without_modes(method: Any) -> Any:
    """Run a method of a mesh, which needs the values of its ranks, with real tensors."""

    def real(*args: Any) -> Any:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return method(*args)

    return real


class _HostReads(TorchDispatchMode):
    """Returns 1 when the host reads a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.addmm.dtype_out:  # torch 2.11 decomposes it as if its dtype were `beta`
            return kwargs["out"]
        return 1 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


class _OnGpu(TorchFunctionMode):
    """Reports tensors as on the GPU, and allocates them on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == IS_CUDA:
            return _called_by_project(2) or func(*args)
        if func == DEVICE:
            device = func(*args)
            return CUDA if device == CPU and _called_by_project(2) else device
        if func is torch.Tensor.tolist:
            return [1] * args[0].numel()
        if func is F.rms_norm:
            return _RMSNorm.apply(args[0], kwargs["weight"])
        return func(*map(_on_cpu, args), **{key: _on_cpu(value) for key, value in kwargs.items()})


def _called_by_project(depth: int) -> bool:
    return not sys._getframe(depth).f_globals.get("__name__", "").startswith("torch")


def _device(tensor: Any) -> torch.device:
    device = FAKE_DEVICE(tensor)
    return CUDA if device == CPU and _called_by_project(2) else device


def _on_cpu(value: Any) -> Any:
    return CPU if isinstance(value, torch.device) and value.type == "cuda" else value


class _RMSNorm(torch.autograd.Function):
    """RMSNorm as one kernel that saves one value per row, as on a GPU; the CPU's has ten operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return torch.add(x, grad), torch.empty_like(weight)


def _fake_triton(stack: ExitStack, on_launch: Callable[[tuple[Any, ...]], object]) -> None:
    """Replace Triton kernels by ones that do nothing, whether Triton is installed or not."""
    kernel = mock.MagicMock()
    kernel.__getitem__.return_value = lambda *args, **_: on_launch(args)
    language = SimpleNamespace(constexpr=None)
    triton: Any = SimpleNamespace(language=language, jit=lambda _: kernel, cdiv=lambda a, b: -(-a // b))
    find_spec = importlib.util.find_spec

    def find_triton(name: str, package: str | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, None) if name == "triton" and _called_by_project(2) else find_spec(name, package)

    for name in TRITON_KERNELS:
        spec: Any = find_spec(name)
        module = importlib.util.module_from_spec(spec)
        with mock.patch.dict(sys.modules, {"triton": triton, "triton.language": language}):
            spec.loader.exec_module(module)
        package, _, attribute = name.rpartition(".")
        stack.enter_context(mock.patch.object(sys.modules[package], attribute, module, create=True))
        sys.modules[name] = module
        stack.callback(sys.modules.pop, name)
    stack.enter_context(mock.patch.object(importlib.util, "find_spec", find_triton))
