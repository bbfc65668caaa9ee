# pyright: basic, reportMissingImports=false
"""The kernels of `gated.py`, `thin.py` and `rotation.py`, apart because Triton is not everywhere."""

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


@triton.jit
def rotation_tile(
    q, k, cos, sin, out_q, out_k, tokens, heads_q, heads_k, blocks_q,
    q_row, q_head, q_token, k_row, k_head, k_token, cos_row, half,
    HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """x cos + rotate_half(x) sin for HEADS heads of one token of q or k; strides in numbers, `half` of a head's width."""
    row, token = (tl.program_id(0) // tokens).to(tl.int64), tl.program_id(0) % tokens
    block = tl.program_id(1)
    d = tl.arange(0, HALF)
    turns = row * cos_row + token * 2 * half + d
    c1, c2 = tl.load(cos + turns, mask=d < half, other=0.0), tl.load(cos + turns + half, mask=d < half, other=0.0)
    s1, s2 = tl.load(sin + turns, mask=d < half, other=0.0), tl.load(sin + turns + half, mask=d < half, other=0.0)
    if block < blocks_q:
        h = block * HEADS + tl.arange(0, HEADS)
        turn_heads(q + row * q_row + token * q_token, out_q, q_head, h, heads_q, row * tokens + token, c1, c2, s1, s2, d, half)
    else:
        h = (block - blocks_q) * HEADS + tl.arange(0, HEADS)
        turn_heads(k + row * k_row + token * k_token, out_k, k_head, h, heads_k, row * tokens + token, c1, c2, s1, s2, d, half)


@triton.jit
def turn_heads(x, out, stride, h, heads, place, c1, c2, s1, s2, d, half):
    """Rounds where PyTorch's two products and their sum do."""
    inside = (h < heads)[:, None] & (d < half)[None, :]
    at = x + h[:, None] * stride + d[None, :]
    first, second = tl.load(at, mask=inside, other=0.0), tl.load(at + half, mask=inside, other=0.0)
    kind = first.dtype
    a, b = first.to(tl.float32), second.to(tl.float32)
    low = (a * c1[None, :].to(tl.float32)).to(kind).to(tl.float32) - (b * s1[None, :].to(tl.float32)).to(kind).to(tl.float32)
    high = (b * c2[None, :].to(tl.float32)).to(kind).to(tl.float32) + (a * s2[None, :].to(tl.float32)).to(kind).to(tl.float32)
    to = out + (place * heads + h[:, None]) * 2 * half + d[None, :]
    tl.store(to, low.to(kind), mask=inside)
    tl.store(to + half, high.to(kind), mask=inside)
