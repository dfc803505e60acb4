"""Exact fp32 master weights beside parameters of any dtype, for this process's shard of each."""

from collections.abc import Mapping

import torch
from torch import Tensor

from parallel.shards import ParamShard


class MasterWeights:
    """The fp32 masters of a model's parameters, by name.

    An fp32 parameter is its own master. One in bf16 is the upper half of its master, whose lower half is kept beside
    it, so that an exact master costs four bytes with the parameter. One in fp16 has a master of its own.
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
        """Return the fp32 master of this process's shard; of a bf16 parameter it is a copy."""
        param, remainder = self.shards[name], self.remainder.get(name)
        if remainder is None:
            return param
        return remainder if remainder.dtype == torch.float32 else join(param, remainder)

    def write(self, name: str, master: Tensor) -> None:
        """Set a parameter and its master."""
        param, remainder = self.shards[name], self.remainder.get(name)
        if remainder is not None and remainder.dtype == torch.int16:
            master, lower = split(master)
            remainder.copy_(lower)
        elif remainder is not None:
            remainder.copy_(master)
        param.copy_(master)

    def to_save(self, name: str) -> Tensor:
        """Return a master laid out as its parameter is; of a bf16 parameter it is on the CPU."""
        param, remainder = self.shards[name], self.remainder.get(name)
        if remainder is not None and remainder.dtype == torch.int16:
            return self.params[name].laid_out(join(param.cpu(), remainder.cpu()))
        return self.params[name].laid_out(self.read(name))


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split fp32 into the nearest bf16 (of two the one further from 0) and the bits it is off by, int16."""
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    lower = bits - (upper << 16)
    return upper.to(torch.int16).view(torch.bfloat16), lower.to(torch.int16)


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """Return the fp32 numbers that `split` divided."""
    return ((upper.view(torch.int16).int() << 16) + lower).view(torch.float32)
