"""What a compiled part of a model keeps and moves, without a compiler: its graph is cut as Inductor's would be."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import stateless

from dry_run.trace import Ledger

Compile = Callable[..., Callable[..., Any]]


def compile_with(ledger: Ledger, untold: Callable[[], AbstractContextManager[object]]) -> Compile:
    """Give a stand-in for `torch.compile` of modules' methods.

    Forward and backward are cut by the partitioner that Inductor uses, over Inductor's operations, so the same
    tensors are kept between them. Each graph counts as one kernel beside its products. All modules share the
    graphs of the first; `untold` hides from view what tracing them makes.
    """
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs: dict[Any, Callable[..., Any]] = {}

    def as_one_kernel(graph: Any, _example: Any) -> Any:
        def run(*args: Any) -> Any:
            with ledger.fused():
                result = graph(*args)
            ledger.launched((*args, *result))
            return result

        return make_boxed_func(run)

    def compiled(method: Any, **_: Any) -> Callable[..., Any]:
        module: nn.Module = method.__self__
        body = method.__func__

        def pure(params: dict[str, Any], *args: Any) -> Any:
            with torch._C.DisableTorchFunction(), stateless._reparametrize_module(module, params):
                return body(module, *args)

        def call(*args: Any) -> Any:
            params = dict(module.named_parameters())
            if body not in graphs:
                graphs[body] = aot_function(
                    pure,
                    fw_compiler=as_one_kernel,  # type: ignore[arg-type]
                    bw_compiler=as_one_kernel,  # type: ignore[arg-type]
                    partition_fn=min_cut_rematerialization_partition,
                    decompositions=select_decomp_table(),
                )
                with untold():
                    graphs[body](params, *args)
            return graphs[body](params, *args)

        return call

    return compiled
