"""What stands between two products of a decoder layer as one kernel, with the dial's branch of the product before it inside.

A residual sum is one with the branch of the product that it adds and with the norm behind it; the branches of queries,
keys and values are one with the rotation and with writing the cache. The roundings are PyTorch's, so alpha 0 adds exact
zeros. A x in the norm's kernel too was tried on an H100: two kernels are faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cotvalve.engines.kernels import by_rows, power, turns
from cotvalve.engines.slots import Placed
from cotvalve.inlets import Parts


class Tile(NamedTuple):
    """What one program of the heads' kernel computes."""

    rows: int
    """Tokens of one head."""
    warps: int


TILES = (Tile(32, 4), Tile(16, 2), Tile(64, 4), Tile(128, 8))
"""Which ones are fastest is measured on the card."""
WIDEST = 2048
"""Of a norm: 16 rows of it lie in a block's registers."""


def normed(
    hidden: Tensor, more: Parts | None, w: Tensor, eps: float, sums: Tensor | None = None, alpha: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """hidden + y + s B t [B, T, W] of a product's parts, and its RMS norm times `w`. With `sums` t is made of them, as
    `gated_ahead` gives them; with `alpha` (one for all, per row or per token) it is still to be multiplied by that."""
    from cotvalve.engines.between_tiles import norm_tile

    hidden, w = hidden.contiguous(), w.contiguous()
    width = hidden.shape[-1]
    rows, columns = hidden.numel() // width, power(width)
    total, x = hidden, torch.empty_like(hidden)
    # The kernel wants some tensor for each that is not there.
    y = turned = b = hidden
    wide, stride, rank, scale, blocks = width, 0, 0, 0.0, 0
    if more is not None:
        y, total = by_rows(more[0]), torch.empty_like(hidden)
        wide = y.stride(0)
        thin = more[1] if sums is None else sums
        if thin is not None and (up := more[2]) is not None:
            turned, b, scale = thin, up, more[3]
            stride, rank = turned.stride(0), b.shape[1]
    if sums is not None:
        blocks, stride = len(sums), 0
    by, tokens, late = turns(alpha, hidden, rows)
    tile: Any = norm_tile
    tile[(-(-rows // 16),)](
        hidden, y, turned, b, w, by, total, x, rows, width, wide, stride, rank, blocks, tokens, scale, eps, ADD=more is not None, BRANCH=rank > 0,
        LATE=late, EIGHTS=not (rank % 8 or stride % 8), RANK=power(rank), BLOCKS=1 << (blocks - 1).bit_length() if blocks else 0, ROWS=16, COLUMNS=columns,
        num_warps=8 if columns <= 1024 else 16,
    )  # fmt: skip
    return total, x


def turned_heads(
    parts: Sequence[Parts], cos: Tensor, sin: Tensor, placed: Placed | None = None, tile: Tile = TILES[0], alpha: Tensor | None = None
) -> list[Tensor]:
    """Queries, keys and values [B, T, heads, D] of the parts of their products [B, T, heads * D], the first two turned by cos
    and sin [B or 1, T, D]. With `placed` keys and values are written there, and only queries are new. `alpha` as for `normed`."""
    from cotvalve.engines.between_tiles import heads_tile

    rows, tokens = parts[0][0].shape[:2]
    cos, sin = cos.contiguous(), sin.contiguous()
    dim = cos.shape[-1]
    y = [by_rows(part[0]) for part in parts]
    heads, others, _ = counts = [one.shape[-1] // dim for one in y]
    out = [one.new_empty(rows, tokens, count, dim) for one, count in zip(y[: 1 if placed else 3], counts, strict=False)]
    out += placed[:2] if placed else ()
    turned = [one if part[1] is None else part[1] for one, part in zip(y, parts, strict=True)]
    b = [one if part[2] is None else part[2] for one, part in zip(y, parts, strict=True)]
    dial = parts[0][1] is not None
    ranks, strides = ([one.shape[1] if dial else 0 for one in b], [one.stride(0) if dial else 0 for one in turned])
    by, each, late = turns(alpha, y[0], rows * tokens)
    kernel: Any = heads_tile
    kernel[-(-rows * tokens // tile.rows), heads + 2 * others](
        *y, *turned, *b, by, cos, sin, placed[2] if placed else cos, *out, rows * tokens, tokens, each, heads, others, dim // 2,
        tokens * dim if len(cos) > 1 else 0, *(one.stride(0) for one in y), *strides, *ranks, *(part[3] for part in parts),
        DIAL=dial, LATE=late and dial, PLACED=placed is not None,
        EIGHTS=not any(number % 8 for number in (*ranks, *strides)), RANK=power(max(ranks)), ROWS=tile.rows, HALF=power(dim // 2),
        num_warps=tile.warps,
    )  # fmt: skip
    return out
