"""A GPU that is not there: tensors without numbers, kernels that are not launched, and code that takes its GPU branch."""

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
IS_CUDA, DEVICE = torch.Tensor.is_cuda.__get__, torch.Tensor.device.__get__  # type: ignore[attr-defined]
REAL_DEVICE: Any = FakeTensor.device.fget


@contextmanager
def pretended_gpu(kernels: Iterable[str] = ()) -> Iterator[None]:
    """Let tensors have shapes only, and be on a GPU as far as our own code can see.

    Where they really are is the CPU, so that torch's own code, which can be run without a GPU, is run as it is.
    `kernels` are the modules of Triton kernels that the code may want.
    """
    with ExitStack() as stack:
        stack.enter_context(_no_kernels(tuple(kernels)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(mock.patch.object(FakeTensor, "device", property(_device)))
        stack.enter_context(_OnGpu())
        yield


class _OnGpu(TorchFunctionMode):
    """Answers as a GPU's tensors would, and makes on the CPU what is asked for on the GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == IS_CUDA:
            return _asked_by_us(2) or func(*args)
        if func == DEVICE:
            found = func(*args)
            return CUDA if found == CPU and _asked_by_us(2) else found
        if func is F.rms_norm:
            return _rms_norm(*args, **kwargs)
        if any(_is_cuda(part) for part in [*args, *kwargs.values()]):
            args = [CPU if _is_cuda(part) else part for part in args]
            kwargs = {key: CPU if _is_cuda(part) else part for key, part in kwargs.items()}
        return func(*args, **kwargs)


def _device(tensor: Any) -> torch.device:
    real = REAL_DEVICE(tensor)
    return CUDA if real == CPU and _asked_by_us(2) else real


def _asked_by_us(depth: int) -> bool:
    return not sys._getframe(depth).f_globals.get("__name__", "").startswith("torch")


def _is_cuda(part: Any) -> bool:
    return isinstance(part, torch.device) and part.type == "cuda"


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """A GPU has one kernel for it, and keeps one number a row for the backward pass."""
    return torch.ops.aten._fused_rms_norm(x, list(shape), weight, eps)[0]


@contextmanager
def _no_kernels(modules: tuple[str, ...]) -> Iterator[None]:
    """Let the kernels of our Triton modules be launched to no effect, whether Triton is installed or not."""
    if importlib.util.find_spec("triton") is not None:
        with mock.patch("triton.runtime.jit.JITFunction.run", lambda *_a, **_k: None):
            yield
        return
    triton, language = ModuleType("triton"), ModuleType("triton.language")
    vars(triton).update(language=language, jit=_Kernel, cdiv=lambda a, b: -(-a // b))
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


class _Kernel:
    def __init__(self, function: Any) -> None:
        self.function = function

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_a, **_k: None
