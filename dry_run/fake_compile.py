"""Memory and traffic of compiled code, from graphs partitioned as in Inductor but not compiled."""

from collections.abc import Callable
from inspect import unwrap
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.traceback import preserve_node_meta
from torch.nn.utils import stateless

from dry_run.trace import Trace
from parallel.parallelize import keep_products


def fake_compile(trace: Trace) -> Callable[..., Callable[..., Any]]:
    """Return a replacement of `torch.compile`.

    A method's graph has Inductor's decompositions and partitioner, so that the same tensors are saved for backward, and
    counts as its matrix products and one kernel. All modules share the graphs of the first, whose compilation is not
    traced. A function counts as one kernel.
    """
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    compiled: dict[Any, Callable[..., Any]] = {}

    def partition(joint: Any, *args: Any, **kwargs: Any) -> Any:
        for node in joint.graph.nodes:
            node.meta.pop("ac_graph_id", None)  # of checkpointed regions, set by Dynamo alone
        return min_cut_rematerialization_partition(joint, *args, **kwargs)

    decompositions = select_decomp_table()
    options: Any = {"partition_fn": partition, "decompositions": decompositions}

    def one_kernel(function: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with mock.patch.object(trace, "paused", True):
                result = function(*args)
            trace.memory.record(result, is_collective=False)
            trace.record_kernel((*args, result))
            return result

        return call

    def as_one_kernel(graph: Any, _example: Any) -> Any:
        def run(*args: Any) -> Any:
            trace.products_only = True
            result = graph(*args)
            trace.products_only = False
            trace.record_kernel((*args, *result))
            return result

        return make_boxed_func(run)

    def compile_method(function: Any, **_: Any) -> Callable[..., Any]:
        method = unwrap(function)
        if not hasattr(method, "__self__"):
            return one_kernel(method)
        module: nn.Module = method.__self__
        body = method.__func__

        def functional(params: dict[str, Any], *args: Any) -> Any:
            with torch._C.DisableTorchFunction(), stateless._reparametrize_module(module, params):
                return body(module, *args)

        if method is not function:
            functional = keep_products(functional)

        def call(*args: Any) -> Any:
            params = dict(module.named_parameters())
            if body not in compiled:
                compiled[body] = aot_function(functional, as_one_kernel, **options)  # type: ignore[arg-type]
                # Activation checkpointing counts saved tensors; exclude those of this call.
                hooks = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
                with mock.patch.object(trace, "paused", True), hooks, preserve_node_meta():
                    compiled[body](params, *args)
            return compiled[body](params, *args)

        return call

    return compile_method
