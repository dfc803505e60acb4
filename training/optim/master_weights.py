"""Exact fp32 master weights of parameters of any dtype, for this rank's shards."""

from collections.abc import Mapping

import torch
from torch import Tensor

from parallel.shards import ParamShard

Parts = tuple[Tensor, ...]  # of a tensor that is saved


class MasterWeights:
    """The fp32 master weights of a model's parameters, by name.

    An fp32 parameter is its own master. A bf16 parameter is the upper half of its master, and `remainder` the lower
    half, so that parameter and master take four bytes together. An fp16 parameter has a separate fp32 master.
    """

    def __init__(self, params: Mapping[str, ParamShard]) -> None:
        self.params = params
        self.shards = {name: param.shard.detach() for name, param in params.items()}
        # int16: the lower half of a bf16 parameter's master; fp32: an fp16 parameter's master
        self.remainder: dict[str, Tensor] = {}
        for name, param in self.shards.items():
            if param.dtype == torch.bfloat16:
                self.remainder[name] = torch.zeros_like(param, dtype=torch.int16)
            elif param.dtype != torch.float32:
                self.remainder[name] = param.float()

    def read(self, name: str) -> Tensor:
        """Return the fp32 master of this rank's shard; a copy if the parameter is bf16."""
        return read(self.shards[name], self.remainder.get(name))

    def write(self, name: str, master: Tensor) -> None:
        """Set a parameter and its master."""
        write(self.shards[name], self.remainder.get(name), master)

    def parts(self, name: str) -> Parts:
        """Return the tensors that make up a master; `whole` joins them."""
        param, remainder = self.shards[name], self.remainder.get(name)
        if remainder is None:
            return (param,)
        return (param, remainder) if remainder.dtype == torch.int16 else (remainder,)


def read(param: Tensor, remainder: Tensor | None) -> Tensor:
    """Return a parameter's fp32 master."""
    if remainder is None:
        return param
    return remainder if remainder.dtype == torch.float32 else join(param, remainder)


def write(param: Tensor, remainder: Tensor | None, master: Tensor) -> None:
    """Set a parameter and what its master has beside it."""
    if remainder is not None and remainder.dtype == torch.int16:
        master, lower = split(master)
        remainder.copy_(lower)
    elif remainder is not None:
        remainder.copy_(master)
    param.copy_(master)


def whole(parts: Parts) -> Tensor:
    """Return a saved tensor from its parts; if it is converted to fp32, on the CPU."""
    if len(parts) == 2:
        return join(parts[0].cpu(), parts[1].cpu())
    return parts[0].cpu().float() if parts[0].dtype == torch.bfloat16 else parts[0]


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split fp32 into the nearest bf16 (ties away from 0) and the int16 difference of the bits."""
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    lower = bits - (upper << 16)
    return upper.to(torch.int16).view(torch.bfloat16), lower.to(torch.int16)


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """Invert `split`."""
    bits = upper.view(torch.int16).int()
    return bits.bitwise_left_shift_(16).add_(lower).view(torch.float32)  # in place: allocating takes longer
