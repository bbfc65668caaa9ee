# pyright: basic, reportMissingImports=false
"""The kernels of `gated.py`, `thin.py`, `branch.py`, `rotation.py`, `attend.py` and `draw.py`, apart because Triton is not everywhere."""

import triton
import triton.language as tl


@triton.jit
def gated_tile(
    gate, up, turned_g, b_g, turned_u, b_u, alpha, out, a, sums, rows, width, wide, tokens, stride_g, stride_u, scale_g, scale_u, rank_g, rank_u, rank_a,
    RANK: tl.constexpr, RANK_A: tl.constexpr, EIGHTS: tl.constexpr, DIAL: tl.constexpr, LATE: tl.constexpr, AHEAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """silu(gate + scale_g B_g turned_g) * (up + scale_u B_u turned_u) for one tile of `out` [rows, width].

    Rows of gate and up begin `wide` numbers apart; turned is [rows, rank] with its own stride, B [width, rank]. RANK is a
    power of 2, 16 or more, that no rank exceeds; EIGHTS says that ranks and strides of turned are multiples of 8, so that
    a row of B is read at once. With LATE turned is A x, to be multiplied by alpha, one number for `tokens` rows each. Sums
    are fp32 and rounded where PyTorch's separate operations round. With AHEAD the tile's part of A out goes to sums
    [blocks of columns, rows, RANK_A], fp32; A is [rank_a, width].
    """
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (i < rows)[:, None] & (j < width)[None, :]
    places = i[:, None] * wide + j[None, :]
    g = tl.load(gate + places, mask=inside, other=0.0)
    u = tl.load(up + places, mask=inside, other=0.0)
    kind = g.dtype
    if DIAL:
        if EIGHTS:
            rank_g, rank_u = rank_g // 8 * 8, rank_u // 8 * 8
            stride_g, stride_u = stride_g // 8 * 8, stride_u // 8 * 8
        k = tl.arange(0, RANK)
        t = tl.load(turned_g + i[:, None] * stride_g + k[None, :], mask=(i < rows)[:, None] & (k < rank_g)[None, :], other=0.0)
        t = late(t, alpha, i, rows, tokens) if LATE else t
        b = tl.load(b_g + j[None, :] * rank_g + k[:, None], mask=(j < width)[None, :] & (k < rank_g)[:, None], other=0.0)
        g = (g.to(tl.float32) + scale_g * tl.dot(t, b)).to(kind)
        t = tl.load(turned_u + i[:, None] * stride_u + k[None, :], mask=(i < rows)[:, None] & (k < rank_u)[None, :], other=0.0)
        t = late(t, alpha, i, rows, tokens) if LATE else t
        b = tl.load(b_u + j[None, :] * rank_u + k[:, None], mask=(j < width)[None, :] & (k < rank_u)[:, None], other=0.0)
        u = (u.to(tl.float32) + scale_u * tl.dot(t, b)).to(kind)
    x = g.to(tl.float32)
    active = (x / (1.0 + tl.exp(-x))).to(kind)
    value = (active.to(tl.float32) * u.to(tl.float32)).to(kind)
    tl.store(out + i[:, None] * width + j[None, :], value, mask=inside)
    if AHEAD:  # in four parts of the columns, which the warps share
        r = tl.arange(0, RANK_A)
        c = tl.reshape(j, (4, COLUMNS // 4))
        left = tl.load(a + r[None, None, :] * width + c[:, :, None], mask=(r < rank_a)[None, None, :] & (c < width)[:, :, None], other=0.0)
        parts = tl.permute(tl.reshape(value, (ROWS, 4, COLUMNS // 4)), (1, 0, 2))
        to = sums + (tl.program_id(1) * rows + i[:, None]) * RANK_A + r[None, :]
        tl.store(to, tl.sum(tl.dot(parts, left), 0), mask=(i < rows)[:, None])


@triton.jit
def thin_tile(
    x, a, alpha, out, rows, width, tokens, rank,
    RANK: tl.constexpr, ROWS: tl.constexpr, DEEP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """alpha * A x for ROWS rows of `out` [rows, rank]: x is [rows, width], a [rank, width], alpha one number for `tokens` rows each."""
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    r = tl.arange(0, RANK)
    turned = turn(x, a, alpha, i, r, rows, width, tokens, rank, ROWS, RANK, DEEP, PARTS)
    tl.store(out + i[:, None] * rank + r[None, :], turned, mask=(i < rows)[:, None] & (r < rank)[None, :])


@triton.jit
def turn(x, a, alpha, i, r, rows, width, tokens, rank, ROWS: tl.constexpr, RANK: tl.constexpr, DEEP: tl.constexpr, PARTS: tl.constexpr):
    """alpha * A x of the rows i, rounded after the product and after alpha; 0 where alpha is. Warps share DEEP columns in PARTS."""
    if PARTS == 1:
        whole = tl.zeros([ROWS, RANK], dtype=tl.float32)
        for start in range(0, width, DEEP):
            k = start + tl.arange(0, DEEP)
            left = tl.load(x + i[:, None] * width + k[None, :], mask=(i < rows)[:, None] & (k < width)[None, :], other=0.0)
            right = tl.load(a + r[None, :] * width + k[:, None], mask=(r < rank)[None, :] & (k < width)[:, None], other=0.0)
            whole = tl.dot(left, right, whole)
    else:
        each: tl.constexpr = DEEP // PARTS
        total = tl.zeros([PARTS, ROWS, RANK], dtype=tl.float32)
        for start in range(0, width, DEEP):
            k = start + tl.arange(0, PARTS)[:, None] * each + tl.arange(0, each)[None, :]
            left = tl.load(x + i[None, :, None] * width + k[:, None, :], mask=(i < rows)[None, :, None] & (k < width)[:, None, :], other=0.0)
            right = tl.load(a + r[None, None, :] * width + k[:, :, None], mask=(r < rank)[None, None, :] & (k < width)[:, :, None], other=0.0)
            total = tl.dot(left, right, total)
        whole = tl.sum(total, 0)
    return late(whole.to(x.dtype.element_ty), alpha, i, rows, tokens)


@triton.jit
def late(t, alpha, i, rows, tokens):
    """alpha * t of the rows i, rounded; 0 where alpha is, whatever t is there."""
    by = tl.load(alpha + i // tokens, mask=i < rows, other=0.0)[:, None]
    return tl.where(by == 0.0, 0.0, t.to(tl.float32) * by).to(t.dtype)


@triton.jit
def branch_tile(
    x, a, alpha, y_1, y_2, y_3, b_1, b_2, b_3, rows, width, tokens, rank, out_1, out_2, out_3, rank_1, rank_2, rank_3, scale_1, scale_2, scale_3,
    RANK: tl.constexpr, EIGHTS: tl.constexpr, ROWS: tl.constexpr, DEEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y += scale B (alpha A x) for ROWS rows of up to three layers that read x; their A lie one below the other in `a`.

    Each y is [rows, out], each B [out, rank]. The programs of one row tile share the blocks of columns among them, and
    each makes alpha A x for itself, in place of another kernel.
    """
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    r = tl.arange(0, RANK)
    turned = turn(x, a, alpha, i, r, rows, width, tokens, rank, ROWS, RANK, DEEP, 1)
    if EIGHTS:
        rank_1, rank_2, rank_3 = rank_1 // 8 * 8, rank_2 // 8 * 8, rank_3 // 8 * 8
    first, second = tl.cdiv(out_1, COLUMNS), tl.cdiv(out_2, COLUMNS)
    for block in range(tl.program_id(1), first + second + tl.cdiv(out_3, COLUMNS), tl.num_programs(1)):
        if block < first:
            add_columns(y_1, b_1, turned, i, r, block, rows, out_1, 0, rank_1, scale_1, COLUMNS)
        elif block < first + second:
            add_columns(y_2, b_2, turned, i, r, block - first, rows, out_2, rank_1, rank_2, scale_2, COLUMNS)
        else:
            add_columns(y_3, b_3, turned, i, r, block - first - second, rows, out_3, rank_1 + rank_2, rank_3, scale_3, COLUMNS)


@triton.jit
def add_columns(y, b, turned, i, r, block, rows, out, start, rank, scale, COLUMNS: tl.constexpr):
    """One block of columns of y; the layer's part of `turned` begins at column `start`."""
    j = block * COLUMNS + tl.arange(0, COLUMNS)
    own = (r >= start) & (r < start + rank)
    up = tl.load(b + j[None, :] * rank + (r - start)[:, None], mask=(j < out)[None, :] & own[:, None], other=0.0)
    inside = (i < rows)[:, None] & (j < out)[None, :]
    at = y + i[:, None] * out + j[None, :]
    before = tl.load(at, mask=inside, other=0.0)
    tl.store(at, (before.to(tl.float32) + scale * tl.dot(turned, up)).to(before.dtype), mask=inside)


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


@triton.jit
def attend_tile(
    q, k, v, used, out, length, dim, shared, scale, q_row, q_head, token, head,
    SHARED: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """softmax(scale q k) v of one row and one key head: all `shared` query heads that read it, KEYS keys at a time.

    q is [rows, heads, dim] with strides, k and v [slots * length, key heads, dim] with the same strides, out contiguous.
    `scale` is for powers of two. Sums are fp32; weights are rounded before they multiply values, as flash attention does.
    """
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, d, t = tl.arange(0, SHARED), tl.arange(0, DIM), tl.arange(0, KEYS)
    mine = (g < shared)[:, None] & (d < dim)[None, :]
    heads = place * shared + g
    query = tl.load(q + row * q_row + heads[:, None] * q_head + d[None, :], mask=mine, other=0.0)
    reach = tl.load(used + row)
    start = row * length * token + place * head
    most = tl.full([SHARED], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([SHARED], dtype=tl.float32)
    total = tl.zeros([SHARED, DIM], dtype=tl.float32)
    for first in range(0, reach, KEYS):
        inside = first + t < reach
        at = start + (first + t).to(tl.int64)[:, None] * token + d[None, :]
        both = inside[:, None] & (d < dim)[None, :]
        keys = tl.load(k + at, mask=both, other=0.0)
        score = tl.where(inside[None, :], tl.dot(query, tl.trans(keys)) * scale, float("-inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        share = tl.exp2(score - higher[:, None])
        fades = tl.exp2(most - higher)
        weight = weight * fades + tl.sum(share, 1)
        values = tl.load(v + at, mask=both, other=0.0)
        total = tl.dot(share.to(values.dtype), values, total * fades[:, None])
        most = higher
    to = out + (row * tl.num_programs(1) * shared + heads)[:, None] * dim + d[None, :]
    tl.store(to, (total / weight[:, None]).to(query.dtype), mask=mine)


@triton.jit
def draw_tile(logits, uniform, temperature, out, vocab, step, SAMPLED: tl.constexpr, BLOCK: tl.constexpr):
    """One row's token: the first of the largest logits, or with SAMPLED and a temperature above 0 the first one at which the
    weights summed up exceed uniform * their sum. Reads the row up to three times, of which the first one fills the cache."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    start = logits + row * step
    best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    at = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, vocab, BLOCK):
        j = first + lanes
        value = tl.load(start + j, mask=j < vocab, other=float("-inf")).to(tl.float32)
        value = tl.where(value != value, float("inf"), value)  # NaN is the largest, as PyTorch has it
        higher = value > best
        best = tl.where(higher, value, best)
        at = tl.where(higher, j, at)
    top = tl.max(best, 0)
    chosen = tl.min(tl.where(best == top, at, vocab), 0)
    if SAMPLED:
        heat = tl.load(temperature + row)
        if heat > 0.0:
            cold = 1.0 / tl.maximum(heat, 1e-6)
            sums = tl.zeros([BLOCK], dtype=tl.float32)
            for first in range(0, vocab, BLOCK):
                sums += weights(start, first + lanes, vocab, top, cold)
            wanted = tl.load(uniform + row) * tl.sum(sums, 0)
            before = 0.0
            first = 0
            found = vocab
            last = chosen
            while (first < vocab) & (found == vocab):
                mass = weights(start, first + lanes, vocab, top, cold)
                after = before + tl.sum(mass, 0)
                last = tl.maximum(last, tl.max(tl.where(mass > 0.0, first + lanes, 0), 0))
                if after > wanted:
                    inside = before + tl.cumsum(mass, 0)
                    found = tl.min(tl.where((inside > wanted) & (mass > 0.0), first + lanes, vocab), 0)
                before = after
                first += BLOCK
            # Rounding may leave the draw past the last weight; it belongs to the last token that has one.
            chosen = tl.where(found < vocab, found, last)
    tl.store(out + row, chosen.to(tl.int64))


@triton.jit
def weights(start, j, vocab, top, cold):
    value = tl.load(start + j, mask=j < vocab, other=float("-inf")).to(tl.float32)
    return tl.where(j < vocab, tl.exp((value - top) * cold), 0.0)
