"""A GPU that is not there: tensors without numbers, kernels that are not launched, code that takes its GPU branch."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
HOPPER = (9, 0)  # its compute capability
IS_CUDA, DEVICE = torch.Tensor.is_cuda.__get__, torch.Tensor.device.__get__  # type: ignore[attr-defined]
Launched = Callable[[tuple[Any, ...]], object]
REAL_DEVICE: Any = FakeTensor.device.fget
TO_EMPTY = nn.Module.to_empty
MAKE_WRAPPER: Any = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]


@contextmanager
def pretended_gpu(kernels: Iterable[str] = (), launched: Launched = lambda _: None) -> Iterator[None]:
    """Let tensors have shapes only, and be on a GPU as far as our own code can see.

    Where they really are is the CPU, so that torch's own code, which can be run without a GPU, is run as it is.
    `kernels` are the modules of Triton kernels that the code may want, and `launched` is given their arguments.
    """
    with ExitStack() as stack:
        stack.enter_context(_no_kernels(tuple(kernels), launched))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(mock.patch.object(FakeTensor, "device", property(_device)))
        stack.enter_context(mock.patch.object(torch.Tensor, "_make_wrapper_subclass", _wrapper))
        stack.enter_context(mock.patch.object(nn.Module, "to_empty", _to_empty))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda *_: HOPPER))
        for name in ("__init__", "__getitem__", "_concatenate", "_flatten", "_unflatten"):
            stack.enter_context(mock.patch.object(DeviceMesh, name, _with_numbers(vars(DeviceMesh)[name])))
        stack.enter_context(mock.patch.object(DeviceMesh, "mesh", property(_with_numbers(DeviceMesh.mesh.fget))))
        stack.enter_context(_HostReads())
        stack.enter_context(_OnGpu())
        yield


def _with_numbers(method: Any) -> Any:
    """Let a method of a mesh, which reckons with ranks, see tensors that have numbers."""
    function = method.__func__ if isinstance(method, staticmethod) else method

    def real(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return function(*args, **kwargs)

    return staticmethod(real) if isinstance(method, staticmethod) else real


class _HostReads(TorchDispatchMode):
    """Gives the host a 1 wherever it reads a number, because there is none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 1 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


class _OnGpu(TorchFunctionMode):
    """Answers as a GPU's tensors would, and makes on the CPU what is asked for on the GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == IS_CUDA:
            return _asked_by_us(2) or func(*args)
        if func == DEVICE:
            found = func(*args)
            return CUDA if found == CPU and _asked_by_us(2) else found
        if func is torch.Tensor.tolist:
            return _ones(list(args[0].shape))
        if func is F.rms_norm:
            return _rms_norm(*args, **kwargs)
        return func(*map(_on_cpu, args), **{key: _on_cpu(part) for key, part in kwargs.items()})


def _ones(shape: list[int]) -> Any:
    return [_ones(shape[1:]) for _ in range(shape[0])] if shape else 1


def _on_cpu(part: Any) -> Any:
    return CPU if isinstance(part, torch.device) and part.type == "cuda" else part


def _wrapper(*args: Any, **kwargs: Any) -> Any:
    return MAKE_WRAPPER(*args, **{key: _on_cpu(part) for key, part in kwargs.items()})


def _to_empty(module: nn.Module, *, device: torch.device, recurse: bool = True) -> nn.Module:
    """Do what `to_empty` does, which swaps tensors, and a fake tensor cannot be swapped."""
    for part in module.modules():
        for name, param in part.named_parameters(recurse=False):
            if isinstance(param, FakeTensor):
                setattr(part, name, nn.Parameter(torch.empty_like(param, device=device)))
    if any(isinstance(param, DTensor) for param in module.parameters()):
        return TO_EMPTY(module, device=_on_cpu(device), recurse=recurse)
    return module


def _device(tensor: Any) -> torch.device:
    real = REAL_DEVICE(tensor)
    return CUDA if real == CPU and _asked_by_us(2) else real


def _asked_by_us(depth: int) -> bool:
    return not sys._getframe(depth).f_globals.get("__name__", "").startswith("torch")


def _rms_norm(x: Tensor, _shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
    if not isinstance(x, DTensor):
        return _RMSNorm.apply(x, weight)  # type: ignore[return-value]
    assert isinstance(weight, DTensor)
    partial = [Partial() if place.is_shard() else Replicate() for place in x.placements]
    out = _RMSNorm.apply(x.to_local(), weight.to_local(grad_placements=partial))
    return DTensor.from_local(out, x.device_mesh, x.placements, run_check=False)  # type: ignore[arg-type]


class _RMSNorm(torch.autograd.Function):
    """A GPU has one kernel for it, which keeps one number a row; without a GPU it would be ten operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return torch.add(x, grad), torch.empty_like(weight)


@contextmanager
def _no_kernels(modules: tuple[str, ...], launched: Launched) -> Iterator[None]:
    """Let the kernels of our Triton modules be launched to no effect, whether Triton is installed or not."""
    if importlib.util.find_spec("triton") is not None:
        with mock.patch("triton.runtime.jit.JITFunction.run", lambda _self, *args, **_k: launched(args)):
            yield
        return

    class Kernel:
        def __init__(self, function: Any) -> None:
            self.function = function

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **_k: launched(args)

    triton, language = ModuleType("triton"), ModuleType("triton.language")
    vars(triton).update(language=language, jit=Kernel, cdiv=lambda a, b: -(-a // b))
    vars(language).update(constexpr=None)
    sys.modules.update({"triton": triton, "triton.language": language})
    try:
        for module in modules:
            importlib.import_module(module)
    finally:  # torch itself must not find it
        del sys.modules["triton"], sys.modules["triton.language"]
    find_spec = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, None) if name == "triton" and _asked_by_us(2) else find_spec(name, package)

    try:
        with mock.patch.object(importlib.util, "find_spec", found):
            yield
    finally:
        for module in modules:  # without kernels, they must not outlast the pretence
            package, _, name = module.rpartition(".")
            del sys.modules[module]
            vars(sys.modules[package]).pop(name, None)
