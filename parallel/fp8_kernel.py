"""Triton kernel of the cast to fp8, which writes a matrix and its transpose in one pass."""

from typing import Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

ROWS, COLUMNS = 128, 64


@triton.jit
def _cast_kernel(x, scale, out, transposed, n_rows, n_columns, largest, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < n_rows) & (column < n_columns)
    value = tl.load(x + row * n_columns + column, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
    value = tl.minimum(tl.maximum(value, -largest), largest).to(out.dtype.element_ty)
    tl.store(out + row * n_columns + column, value, mask=inside)
    tl.store(transposed + tl.trans(column * n_rows + row), tl.trans(value), mask=tl.trans(inside))


def cast_both_ways(x_NM: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x_NM = x_NM.contiguous()
    n_rows, n_columns = x_NM.shape
    out = torch.empty(n_rows, n_columns, dtype=dtype, device=x_NM.device)
    transposed = torch.empty(n_columns, n_rows, dtype=dtype, device=x_NM.device)
    grid = (triton.cdiv(n_rows, ROWS), triton.cdiv(n_columns, COLUMNS))
    largest = torch.finfo(dtype).max
    kernel: Any = _cast_kernel
    kernel[grid](x_NM, scale, out, transposed, n_rows, n_columns, largest, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8)
    return out, transposed
