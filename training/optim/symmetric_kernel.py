"""Products of matrices with their own transposes as a Triton kernel that computes half, and writes it twice."""

from typing import Any, NamedTuple

import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore[import-not-found]


class Tiles(NamedTuple):
    """What one program computes: `rows` x `columns` of the result, `depth` of the inner dimension at a time."""

    rows: int  # a multiple of columns, or a divisor
    columns: int
    depth: int
    warps: int
    stages: int
    tma: bool = True


TILES = Tiles(128, 128, 64, warps=8, stages=4)
SQUARE = 1024  # of the result: its tiles are computed at one time, and share their inputs in the L2 cache


@triton.jit
def _symmetric_kernel(
    x, left, right, out, m, k, beta, alpha,
    ADD: tl.constexpr, TMA: tl.constexpr, SQUARE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    down: tl.constexpr = SQUARE // ROWS
    tile = tl.program_id(0) % (down * (SQUARE // COLUMNS))
    square = tl.program_id(0) // (down * (SQUARE // COLUMNS))
    # Squares at and below the diagonal are numbered row by row; a square root may be off by one.
    line = ((tl.sqrt(8.0 * square + 1.0) - 1.0) / 2.0).to(tl.int32)
    line -= (line * (line + 1) // 2 > square).to(tl.int32)
    line += ((line + 1) * (line + 2) // 2 <= square).to(tl.int32)
    top = line * SQUARE + tile % down * ROWS
    side = (square - line * (line + 1) // 2) * SQUARE + tile // down * COLUMNS
    if (side >= top + ROWS) | (top >= m) | (side >= m):
        return
    batch = tl.program_id(1)
    row, column = top + tl.arange(0, ROWS), side + tl.arange(0, COLUMNS)
    x += batch.to(tl.int64) * m * k
    out += batch.to(tl.int64) * m * m
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, k, DEPTH):
        if TMA:
            # Rows after the last one are the next matrix's; what they add to is not stored.
            a = left.load([batch * m + top, start])
            b = right.load([batch * m + side, start])
        else:
            inner = start + tl.arange(0, DEPTH)
            inside = (inner < k)[None, :]
            a = tl.load(x + row[:, None] * k + inner[None, :], mask=(row < m)[:, None] & inside, other=0.0)
            b = tl.load(x + column[:, None] * k + inner[None, :], mask=(column < m)[:, None] & inside, other=0.0)
        total = tl.dot(a, b.T, total)
    inside = (row < m)[:, None] & (column < m)[None, :]
    if ADD:
        added = tl.load(x + row[:, None] * k + column[None, :], mask=inside, other=0.0)
        total = tl.fma(total, alpha, beta * added.to(tl.float32))
    found = total.to(out.dtype.element_ty)
    tl.store(out + row[:, None] * m + column[None, :], found, mask=inside)
    # Tiles on the diagonal hold both halves, equal to the last bit: sums of the same products in the same order.
    if side + COLUMNS <= top:
        tl.store(out + column[:, None] * m + row[None, :], found.T, mask=inside.T)


def product(x: Tensor, *, beta: float = 0.0, alpha: float = 1.0, tiles: Tiles = TILES) -> Tensor:
    """Return x x^T for matrices (n, m, k); with `beta`, and for symmetric x, beta x + alpha x x^T."""
    n, m, k = x.shape
    x, out = x.contiguous(), x.new_empty(n, m, m)
    left: Any = x
    right: Any = x
    tma = tiles.tma and k * x.element_size() % 16 == 0
    if tma:
        rows = x.view(n * m, k)
        left, right = (TensorDescriptor.from_tensor(rows, [size, tiles.depth]) for size in (tiles.rows, tiles.columns))
    down = triton.cdiv(m, SQUARE)
    programs = down * (down + 1) // 2 * (SQUARE // tiles.rows) * (SQUARE // tiles.columns)
    kernel: Any = _symmetric_kernel
    kernel[(programs, n)](
        x, left, right, out, m, k, beta, alpha,
        ADD=beta != 0, TMA=tma, SQUARE=SQUARE, ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out
