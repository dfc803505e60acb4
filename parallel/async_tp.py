"""Matrix products pipelined with the messages of tensor parallelism, by a pass of the compiler's (async_tp)."""

from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.distributed.device_mesh import DeviceMesh

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default)
GATHERED = torch.ops._c10d_functional.wait_tensor.default


def overlap_tp(mesh: DeviceMesh) -> None:
    """Let the compiler overlap matrix products with the collectives of tp; torch has only private switches for it."""
    import torch._inductor.config as inductor_config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor: Any = inductor_config
    inductor._micro_pipeline_tp = True
    inductor.post_grad_custom_pre_pass = BareProducts()
    enable_symm_mem_for_group(mesh.get_group().group_name)


class BareProducts(CustomGraphPass):
    """Lets gathered tokens be the direct input of products, which is what the compiler's pass looks for."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.target in VIEWS and node.args[0].target in VIEWS:
                origin = node.args[0].args[0]
                if origin.meta["val"].shape == node.meta["val"].shape:
                    node.replace_all_uses_with(origin)
        for node in list(graph.nodes):
            if node.target is aten.addmm.default and node.args[1].target is GATHERED:
                bias, left, right = node.args
                with graph.inserting_before(node):
                    product = graph.call_function(aten.mm.default, (left, right))
                    # one dimension more, or a later pass would make them one operation again
                    row = graph.call_function(aten.unsqueeze.default, (product, 0))
                    sums = graph.call_function(aten.add.Tensor, (row, bias))
                    out = graph.call_function(aten.squeeze.dim, (sums, 0))
                for new, value in ((product, 1), (row, 0), (sums, 0), (out, 1)):
                    new.meta["val"] = node.meta["val"] if value else node.meta["val"].unsqueeze(0)
                node.replace_all_uses_with(out)
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))
