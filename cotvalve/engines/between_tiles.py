# pyright: basic, reportMissingImports=false
"""The kernels of `between.py`, apart because Triton is not everywhere."""

import triton
import triton.language as tl

from cotvalve.engines.tiles import late


@triton.jit
def norm_tile(
    h, y, turned, b, w, alpha, out, x, rows, width, wide, stride, rank, blocks, tokens, scale, eps, ADD: tl.constexpr, BRANCH: tl.constexpr,
    LATE: tl.constexpr, EIGHTS: tl.constexpr, RANK: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = h + (y + scale B turned) and x, its RMS norm times w: ROWS rows of [rows, width], which COLUMNS hold.

    Rows of y begin `wide` numbers apart. Without ADD there is no y and no out, without BRANCH no B. With BLOCKS (a power
    of 2, no fewer than `blocks`) turned is in parts, fp32 [blocks, rows, RANK]; with LATE alpha is still to be multiplied
    in. Rounded where separate operations round.
    """
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = tl.arange(0, COLUMNS)
    inside = (i < rows)[:, None] & (j < width)[None, :]
    at = i[:, None] * width + j[None, :]
    value = tl.load(h + at, mask=inside, other=0.0)
    kind = value.dtype
    if ADD:
        more = tl.load(y + i[:, None] * wide + j[None, :], mask=inside, other=0.0)
        if BRANCH:
            k = tl.arange(0, RANK)
            if EIGHTS:
                rank, stride = rank // 8 * 8, stride // 8 * 8
            if BLOCKS:
                p = tl.arange(0, BLOCKS)
                parts = turned + (p[:, None, None] * rows + i[None, :, None]) * RANK + k[None, None, :]
                t = tl.sum(tl.load(parts, mask=(p < blocks)[:, None, None] & (i < rows)[None, :, None], other=0.0), 0).to(kind)
            else:
                t = tl.load(turned + i[:, None] * stride + k[None, :], mask=(i < rows)[:, None] & (k < rank)[None, :], other=0.0)
            t = late(t, alpha, i, rows, tokens) if LATE else t
            more = branched(more, t, b, j, width, rank, scale, RANK)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(kind)
        tl.store(out + at, value, mask=inside)
    wide = value.to(tl.float32)
    shrink = tl.rsqrt(tl.sum(wide * wide, 1) / width + eps)
    weight = tl.load(w + j, mask=j < width, other=0.0).to(tl.float32)
    tl.store(x + at, (wide * shrink[:, None] * weight[None, :]).to(kind), mask=inside)


@triton.jit
def branched(y, t, b, j, width, rank, scale, RANK: tl.constexpr):
    """y + scale B t for columns j of y: t is [rows, RANK], B [width, rank]."""
    k = tl.arange(0, RANK)
    up = tl.load(b + j[None, :] * rank + k[:, None], mask=(j < width)[None, :] & (k < rank)[:, None], other=0.0)
    return (y.to(tl.float32) + scale * tl.dot(t, up)).to(y.dtype)


@triton.jit
def heads_tile(
    q, k, v, turned_q, turned_k, turned_v, b_q, b_k, b_v, alpha, cos, sin, position, out_q, out_k, out_v, rows, tokens, each, heads, others, half, cos_row,
    wide_q, wide_k, wide_v, stride_q, stride_k, stride_v, rank_q, rank_k, rank_v, scale_q, scale_k, scale_v,
    DIAL: tl.constexpr, LATE: tl.constexpr, PLACED: tl.constexpr, EIGHTS: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One head of q, k or v for ROWS tokens: its branch added, q and k turned by their positions, k and v put where `position` says.

    q, k, v are [rows, heads, 2 * half], rows `wide` numbers apart; cos and sin [rows / tokens or 1, tokens, 2 * half]. With
    LATE turned is A x, to be multiplied by alpha, one number for `each` rows.
    """
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    if EIGHTS:
        rank_q, rank_k, rank_v = rank_q // 8 * 8, rank_k // 8 * 8, rank_v // 8 * 8
        stride_q, stride_k, stride_v = stride_q // 8 * 8, stride_k // 8 * 8, stride_v // 8 * 8
    to = tl.load(position + i, mask=i < rows, other=0) if PLACED else i
    angle = (i // tokens) * cos_row + i % tokens * 2 * half
    head = tl.program_id(1)
    if head < heads:
        one_head(
            q, turned_q, b_q, alpha, cos, sin, out_q, i, i, angle, head, heads, rows, each, half,
            wide_q, stride_q, rank_q, scale_q, True, DIAL, LATE, RANK, HALF,
        )  # fmt: skip
    elif head < heads + others:
        head -= heads
        one_head(
            k, turned_k, b_k, alpha, cos, sin, out_k, i, to, angle, head, others, rows, each, half,
            wide_k, stride_k, rank_k, scale_k, True, DIAL, LATE, RANK, HALF,
        )  # fmt: skip
    else:
        head -= heads + others
        one_head(
            v, turned_v, b_v, alpha, cos, sin, out_v, i, to, angle, head, others, rows, each, half,
            wide_v, stride_v, rank_v, scale_v, False, DIAL, LATE, RANK, HALF,
        )  # fmt: skip


@triton.jit
def one_head(
    y, turned, b, alpha, cos, sin, out, i, to, angle, head, heads, rows, each, half, wide, stride, rank, scale,
    TURN: tl.constexpr, DIAL: tl.constexpr, LATE: tl.constexpr, RANK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, HALF)
    inside = (i < rows)[:, None] & (d < half)[None, :]
    at = y + i[:, None] * wide + head * 2 * half + d[None, :]
    low, high = tl.load(at, mask=inside, other=0.0), tl.load(at + half, mask=inside, other=0.0)
    kind = low.dtype
    if DIAL:
        k = tl.arange(0, RANK)
        t = tl.load(turned + i[:, None] * stride + k[None, :], mask=(i < rows)[:, None] & (k < rank)[None, :], other=0.0)
        t = late(t, alpha, i, rows, each) if LATE else t
        own = b + head * 2 * half * rank
        low, high = branched(low, t, own, d, half, rank, scale, RANK), branched(high, t, own + half * rank, d, half, rank, scale, RANK)
    if TURN:
        turns = angle[:, None] + d[None, :]
        c1, c2 = tl.load(cos + turns, mask=inside, other=0.0), tl.load(cos + turns + half, mask=inside, other=0.0)
        s1, s2 = tl.load(sin + turns, mask=inside, other=0.0), tl.load(sin + turns + half, mask=inside, other=0.0)
        low, high = rotate(low, high, c1, s1), rotate(high, -low, c2, s2)
    place = out + (to[:, None] * heads + head) * 2 * half + d[None, :]
    tl.store(place, low.to(kind), mask=inside)
    tl.store(place + half, high.to(kind), mask=inside)


@triton.jit
def rotate(x, beside, cos, sin):
    """x cos - beside sin, rounded where PyTorch's two products and their sum are."""
    one, two = x.to(tl.float32) * cos.to(tl.float32), beside.to(tl.float32) * sin.to(tl.float32)
    return (one.to(x.dtype).to(tl.float32) - two.to(x.dtype).to(tl.float32)).to(x.dtype)
