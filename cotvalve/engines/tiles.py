# pyright: basic, reportMissingImports=false
"""The kernels of `gated.py` and `thin.py`, apart because Triton is not everywhere."""

import triton
import triton.language as tl


@triton.jit
def gated_tile(
    gate, up, turned_g, b_g, turned_u, b_u, out, rows, width, stride_g, stride_u, scale_g, scale_u, rank_g, rank_u,
    RANK: tl.constexpr, DIAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """silu(gate + scale_g B_g turned_g) * (up + scale_u B_u turned_u) for one tile of `out` [rows, width].

    gate, up and out lie row by row; turned is [rows, rank] with its own stride, B [width, rank]. RANK is a power of 2,
    16 or more, that no rank exceeds. Sums are fp32 and rounded where PyTorch's separate operations round.
    """
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (i < rows)[:, None] & (j < width)[None, :]
    places = i[:, None] * width + j[None, :]
    g = tl.load(gate + places, mask=inside, other=0.0)
    u = tl.load(up + places, mask=inside, other=0.0)
    kind = g.dtype
    if DIAL:
        k = tl.arange(0, RANK)
        t = tl.load(turned_g + i[:, None] * stride_g + k[None, :], mask=(i < rows)[:, None] & (k < rank_g)[None, :], other=0.0)
        b = tl.load(b_g + j[None, :] * rank_g + k[:, None], mask=(j < width)[None, :] & (k < rank_g)[:, None], other=0.0)
        g = (g.to(tl.float32) + scale_g * tl.dot(t, b)).to(kind)
        t = tl.load(turned_u + i[:, None] * stride_u + k[None, :], mask=(i < rows)[:, None] & (k < rank_u)[None, :], other=0.0)
        b = tl.load(b_u + j[None, :] * rank_u + k[:, None], mask=(j < width)[None, :] & (k < rank_u)[:, None], other=0.0)
        u = (u.to(tl.float32) + scale_u * tl.dot(t, b)).to(kind)
    x = g.to(tl.float32)
    active = (x / (1.0 + tl.exp(-x))).to(kind)
    tl.store(out + places, (active.to(tl.float32) * u.to(tl.float32)).to(kind), mask=inside)


@triton.jit
def thin_tile(
    x, a, alpha, out, rows, width, tokens, rank,
    RANK: tl.constexpr, ROWS: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """alpha * A x for ROWS rows of `out` [rows, rank]: x is [rows, width], a [rank, width], alpha one number for `tokens` rows each."""
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    r = tl.arange(0, RANK)
    total = tl.zeros([ROWS, RANK], dtype=tl.float32)
    for start in range(0, width, DEEP):
        k = start + tl.arange(0, DEEP)
        left = tl.load(x + i[:, None] * width + k[None, :], mask=(i < rows)[:, None] & (k < width)[None, :], other=0.0)
        right = tl.load(a + r[None, :] * width + k[:, None], mask=(r < rank)[None, :] & (k < width)[:, None], other=0.0)
        total = tl.dot(left, right, total)
    kind = out.dtype.element_ty
    by = tl.load(alpha + i // tokens, mask=i < rows, other=0.0)[:, None]
    turned = tl.where(by == 0.0, 0.0, total.to(kind).to(tl.float32) * by).to(kind)
    tl.store(out + i[:, None] * rank + r[None, :], turned, mask=(i < rows)[:, None] & (r < rank)[None, :])
