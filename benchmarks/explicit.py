"""What explicit collectives on plain tensors are worth on two GPUs, outside of the engine.

    torchrun --nproc-per-node 2 -m benchmarks.explicit CASE SHAPE [--rows 4] [--micro-batches 1]

A prototype of `parallel/zero.py` and `parallel/tensor_parallel.py`: parameters are views of one flat buffer.

one                 one GPU's rate, on every GPU at the same time
zero1_nccl          reduce-scatter of a block during the backward pass, all-gather behind the update, by NCCL
zero1_copy          the same by copy engines: ranks read each other's shards from symmetric memory, no SM is used
tp_plain            Megatron's sequence-parallel block, compiled with its collectives
tp_graph            the same, forward and backward as one CUDA graph
tp_fused_graph      products pipelined with their messages through symmetric memory, as one CUDA graph
tp_split_graph      halves of the batch on two streams, so that one's messages run beside the other's products
"""

import argparse
import contextlib
import os
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.distributed_c10d as distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import _symmetric_memory as symmetric

from model.loss import linear_cross_entropy

# d_model, layers, heads, d_ff, vocabulary
SHAPES = {
    "1b": (2048, 24, 16, 5632, 32768),
    "7b_12_layers": (4096, 12, 32, 11008, 103168),
}
CASES = ("one", "zero1_nccl", "zero1_copy", "tp_plain", "tp_graph", "tp_fused_graph", "tp_split_graph")


STEPS = 20


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

    out = flash_attn_func(q, k, v, causal=True)
    return out if isinstance(out, Tensor) else out[0]


class GatherMatmul(torch.autograd.Function):
    """`all_gather(x) @ w.T` in pieces, while the next piece is copied; keeps the gathered x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, name: str) -> Tensor:
        gathered, (y,) = torch.ops.symm_mem.fused_all_gather_matmul(x, [w.t()], 0, name)
        ctx.save_for_backward(gathered, w)
        ctx.name = name
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        gathered, w = ctx.saved_tensors
        grad_x = torch.ops.symm_mem.fused_matmul_reduce_scatter(grad, w, "sum", 0, ctx.name)
        return grad_x, grad.t() @ gathered, None


class MatmulScatter(torch.autograd.Function):
    """`reduce_scatter(x @ w.T)` in pieces."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.name = name
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(x, w.t(), "sum", 0, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        gathered, (grad_x,) = torch.ops.symm_mem.fused_all_gather_matmul(grad, [w], 0, ctx.name)
        return grad_x, gathered.t() @ x, None


class VocabularyShard:
    def __init__(self, n_vocab: int) -> None:
        self.n_vocab, self.first = n_vocab, n_vocab // dist.get_world_size() * dist.get_rank()

    def max_(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)

    def sum_(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)


class Block:
    """The two compiled parts of a layer around attention, with their collectives over `group`."""

    def __init__(self, case: str, shape: str, seq_len: int, width: int, group: Any) -> None:
        d_model, _, n_heads, _, _ = SHAPES[shape]
        head_dim = d_model // n_heads
        tp, fused = case.startswith("tp"), case == "tp_fused_graph"

        def into(x: Tensor, w: Tensor) -> Tensor:
            if fused:
                return GatherMatmul.apply(x, w, group.group_name)  # type: ignore[return-value]
            return F.linear(functional.all_gather_tensor_autograd(x, 0, group) if tp else x, w)

        def out_of(x: Tensor, w: Tensor) -> Tensor:
            if fused:
                return MatmulScatter.apply(x, w, group.group_name)  # type: ignore[return-value]
            y = F.linear(x, w)
            return functional.reduce_scatter_tensor_autograd(y, "sum", 0, group) if tp else y

        def norm(x: Tensor, weight: Tensor) -> Tensor:
            return F.rms_norm(x, (d_model,), weight, 1e-5)

        def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            a, b = x.float().chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

        def heads(y: Tensor, bias: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = (y + bias).view(-1, seq_len, 3, n_heads // width, head_dim).unbind(2)
            return rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()

        def add_norm(x: Tensor, y: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            x = x + y + bias
            return x, norm(x, weight)

        def gate(y: Tensor) -> Tensor:
            g, u = y.chunk(2, -1)
            return F.silu(g) * u

        def part(f: Any, compiled: bool) -> Any:
            return torch.compile(f, dynamic=False, fullgraph=True) if compiled else f

        # The fused products are no code for the compiler: what stands between them is compiled by itself.
        norm_, heads_, add_norm_, gate_ = (part(f, fused) for f in (norm, heads, add_norm, gate))

        def before(x: Tensor, p: dict[str, Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return heads_(into(norm_(x, p["g1"]), p["wqkv"]), p["bqkv"], cos, sin)

        def after(x: Tensor, o: Tensor, p: dict[str, Tensor]) -> Tensor:
            x, h = add_norm_(x, out_of(o.flatten(0, 1).flatten(1), p["wo"]), p["bo"], p["g2"])
            return x + out_of(gate_(into(h, p["w13"])), p["w2"])

        self.before, self.after = part(before, not fused), part(after, not fused)


class Run:
    """A model as views of one flat buffer, its fused AdamW on this rank's shards, and a step."""

    def __init__(self, case: str, shape: str, rows: int, micro_batches: int) -> None:
        self.case, self.rows, self.micro_batches = case, rows, micro_batches
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", self.rank)
        self.tp, self.zero = case.startswith("tp"), case.startswith("zero1")
        self.dtype, self.seq_len = torch.bfloat16, 2048
        d, self.n_layers, heads, ff, self.n_vocab = SHAPES[shape]
        self.d_model = d
        width = self.size if self.tp else 1
        layer = {
            "wqkv": (3 * d // width, d), "wo": (d, d // width), "w13": (2 * ff // width, d), "w2": (d, ff // width),
            "g1": (d,), "g2": (d,), "bqkv": (3 * d // width,), "bo": (d,),
        }  # fmt: skip
        ends = ({"embed": (self.n_vocab, d)}, {"norm": (d,), "head": (self.n_vocab // width, d)})
        shapes = [ends[0], *[layer] * self.n_layers, ends[1]]
        total = sum(torch.Size(s).numel() for unit in shapes for s in unit.values())
        self.flat = self._buffer(total)
        self.grads = self._buffer(total) if case == "zero1_copy" else None
        if self.grads is not None:
            name = dist.group.WORLD.group_name  # type: ignore[union-attr]
            self.flat_peers = symmetric.rendezvous(self.flat, name)
            self.grad_peers = symmetric.rendezvous(self.grads, name)
            self.received = torch.empty(total // self.size, dtype=self.dtype, device=self.device)
        self.flat.normal_(0, 0.02, generator=torch.Generator(device=self.device).manual_seed(5))
        self.units: list[dict[str, nn.Parameter]] = []
        self.offset, at = dict[Tensor, int](), 0
        for unit in shapes:
            found = {}
            for name, size in unit.items():
                n = torch.Size(size).numel()
                found[name] = param = nn.Parameter(self.flat[at : at + n].view(size))
                if len(size) == 1:
                    param.data.fill_(0.0 if name[0] == "b" else 1.0)
                self.offset[param] = at
                at += n
            self.units.append(found)
        self.params = [param for unit in self.units for param in unit.values()]
        groups = [dist.group.WORLD, dist.new_group()] if case == "tp_split_graph" else [dist.group.WORLD]
        self.blocks = [Block(case, shape, self.seq_len, width, group) for group in groups]
        self.streams = [torch.cuda.Stream() for _ in groups] if len(groups) > 1 else []
        angle = torch.arange(self.seq_len, device=self.device)[:, None].float()
        angle = angle * 10000.0 ** -(torch.arange(0, d // heads, 2, device=self.device) / (d // heads))
        self.cos, self.sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
        self.state = []
        for p in (self.part(param.data) for param in self.params):
            self.state.append((p.new_zeros(p.shape, dtype=torch.int16), *torch.zeros(2, *p.shape, device=self.device)))
        self.comm: Any = torch.cuda.Stream(priority=-1)
        self.gathered: list[Any] = [None] * len(self.units)
        self.missing, self.last = [0] * len(self.units), True
        for i, unit in enumerate(self.units if self.zero else ()):
            for param in unit.values():
                param.register_post_accumulate_grad_hook(lambda _, i=i: self._count(i))
        n_targets = rows * self.seq_len * micro_batches * (self.size if self.zero else 1)
        self.tokens = torch.zeros(rows, self.seq_len, dtype=torch.int64, device=self.device)
        self.labels = torch.zeros_like(self.tokens)
        self.weights = torch.full((rows * self.seq_len,), 1 / n_targets, device=self.device)
        self.random = torch.Generator().manual_seed(0 if self.tp else self.rank)
        self.graph: Any = None
        self.warm = 0

    def _buffer(self, n: int) -> Tensor:
        if self.case == "zero1_copy":
            return symmetric.empty(n, dtype=self.dtype, device=self.device)
        return torch.empty(n, dtype=self.dtype, device=self.device)

    def part(self, tensor: Tensor) -> Tensor:
        """Return this rank's shard of a parameter or gradient, a view."""
        if not self.zero:
            return tensor
        n = tensor.numel() // self.size
        return tensor.reshape(-1)[n * self.rank : n * (self.rank + 1)]

    def on_comm(self) -> Any:
        self.comm.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.comm)

    def _count(self, i: int) -> None:
        self.missing[i] -= 1
        if self.missing[i] == 0 and self.last:
            self._reduce(list(self.units[i].values()))

    def _reduce(self, params: list[nn.Parameter]) -> None:
        grads = [param.grad for param in params if param.grad is not None]
        if self.grads is None:
            with self.on_comm(), self._coalesced():
                for grad in grads:
                    dist.reduce_scatter_tensor(self.part(grad), grad.view(-1))
            return
        for param, grad in zip(params, grads, strict=True):
            self.grads[self.offset[param] : self.offset[param] + grad.numel()].copy_(grad.view(-1))
        with self.on_comm():
            self.grad_peers.barrier(channel=0)
            for param in params:  # two ranks: what the other has of this rank's shard
                n, at = param.numel() // self.size, self.offset[param]
                theirs = self.grad_peers.get_buffer(1 - self.rank, (n,), self.dtype, at + n * self.rank)
                self.received[at // self.size : at // self.size + n].copy_(theirs)

    def _gather(self, i: int) -> None:
        params = list(self.units[i].values())
        with self.on_comm():
            if self.grads is None:
                with self._coalesced():
                    for param in params:
                        dist.all_gather_into_tensor(param.data.view(-1), self.part(param.data))
            else:
                self.flat_peers.barrier(channel=1)
                for param in params:
                    n = param.numel() // self.size
                    at = self.offset[param] + n * (1 - self.rank)
                    self.flat[at : at + n].copy_(self.flat_peers.get_buffer(1 - self.rank, (n,), self.dtype, at))
            self.gathered[i] = torch.cuda.Event()
            self.gathered[i].record(self.comm)

    def _coalesced(self) -> Any:
        return distributed._coalescing_manager(group=dist.group.WORLD, device=self.device, async_ops=False)

    def _need(self, i: int) -> None:
        if self.gathered[i] is not None:
            torch.cuda.current_stream().wait_event(self.gathered[i])

    def loss(self) -> Tensor:
        self._need(0)
        tokens = self.tokens.flatten()
        if self.tp:  # each rank embeds its share of the tokens
            n = len(tokens) // self.size
            tokens = tokens[n * self.rank : n * (self.rank + 1)]
        x = F.embedding(tokens, self.units[0]["embed"])
        halves, main = list(x.chunk(len(self.blocks))), torch.cuda.current_stream()
        for stream in self.streams:
            stream.wait_stream(main)
        for i in range(self.n_layers):
            self._need(i + 1)
            p = self.units[i + 1]
            for j, block in enumerate(self.blocks):
                with torch.cuda.stream(self.streams[j]) if self.streams else contextlib.nullcontext():
                    o = flash_attention(*block.before(halves[j], p, self.cos, self.sin))
                    halves[j] = block.after(halves[j], o, p)
        for stream in self.streams:
            main.wait_stream(stream)
        self._need(self.n_layers + 1)
        h = F.rms_norm(torch.cat(halves), (self.d_model,), self.units[-1]["norm"], 1e-5)
        if self.tp:
            h = functional.all_gather_tensor_autograd(h, 0, dist.group.WORLD)  # type: ignore[arg-type]
        shard = VocabularyShard(self.n_vocab) if self.tp else None
        head, labels = self.units[-1]["head"], self.labels.flatten()
        return linear_cross_entropy(h, head, labels, self.weights, chunk_tokens=4096, shard=shard)[0]

    def passes(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        if self.tp:  # norms and output biases have seen this rank's tokens alone
            small = [p for p in self.params if p.shape == (self.d_model,)]
            sums = torch.cat([p.grad for p in small if p.grad is not None])
            dist.all_reduce(sums)
            for param, total in zip(small, sums.split(self.d_model), strict=True):
                param.grad.copy_(total)  # type: ignore[union-attr]
        return loss.detach()

    def shard_gradient(self, param: nn.Parameter) -> Tensor:
        assert param.grad is not None
        if self.grads is None:
            return self.part(param.grad)
        n, at = param.numel() // self.size, self.offset[param]
        grad = self.part(self.grads[at : at + param.numel()])
        return grad.add_(self.received[at // self.size : at // self.size + n])

    def update(self) -> None:
        from training.optim.adamw_kernel import update

        if self.zero:
            torch.cuda.current_stream().wait_stream(self.comm)
        grads = {param: self.shard_gradient(param) for param in self.params}
        square = torch.stack(torch._foreach_norm(list(grads.values()))).float().square().sum()  # type: ignore[attr-defined]
        if self.size > 1 and self.case != "one":
            dist.all_reduce(square)
        clip = (square.sqrt() + 1e-6).clamp(min=1.0)
        rates = torch.tensor([1.0, 0.99999, 0.95, 0.05, -1e-4, 1.0], device=self.device)
        scalars = torch.cat([clip[None], rates])
        state = dict(zip(self.params, self.state, strict=True))
        for i, unit in enumerate(self.units):
            for param in unit.values():
                rest, exp_avg, exp_avg_sq = state[param]
                update(self.part(param.data), rest, grads[param], exp_avg, exp_avg_sq, scalars, beta1=0.9, eps=1e-8)
            if self.zero:
                self._gather(i)
        if not self.case.endswith("graph"):
            for param in self.params:
                param.grad = None

    def step(self) -> Tensor:
        loss = torch.zeros(())
        for i in range(self.micro_batches):
            self.last = i == self.micro_batches - 1
            self.missing = [len(unit) for unit in self.units]
            x = torch.randint(0, self.n_vocab, (self.rows, self.seq_len + 1), generator=self.random)
            x = x.pin_memory()
            self.tokens.copy_(x[:, :-1], non_blocking=True)
            self.labels.copy_(x[:, 1:], non_blocking=True)
            loss = self._captured() if self.case.endswith("graph") else self.passes()
        self.update()
        self.warm += 1
        return loss

    def _captured(self) -> Tensor:
        if self.graph is None:
            for param in self.params:
                param.grad = None
        if self.warm < 3:
            return self.passes()
        if self.graph is None:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.captured_loss = self.passes()
        self.graph.replay()
        return self.captured_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--rows", type=int, default=4, help="sequences of 2,048 tokens per micro-batch")
    parser.add_argument("--micro-batches", type=int, default=1)
    args = parser.parse_args()
    torch.cuda.set_device(rank := int(os.environ["RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    run = Run(args.case, args.shape, args.rows, args.micro_batches)
    for _ in range(6):
        run.step()
    torch.cuda.synchronize()
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(STEPS):
        loss = run.step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) / STEPS
    tokens = args.rows * run.seq_len * args.micro_batches / (run.size if run.tp else 1)
    if rank == 0:
        memory = torch.cuda.max_memory_allocated() / 2**30
        print(
            f"{args.case:15} {args.shape:12} {args.micro_batches} x {args.rows} x 2,048  "
            f"{tokens / seconds:9,.0f} tokens/s/GPU  {seconds * 1e3:7.2f} ms  {memory:.1f} GiB  loss {float(loss):.4f}",
            flush=True,
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
