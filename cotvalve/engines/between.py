"""What stands between two products of a decoder layer as one kernel, with the dial's branch of the product before it inside.

A residual sum is one with the branch of the product that it adds, the norm behind it, and A x of the layers that read
that norm; the branches of queries, keys and values are one with the rotation and with writing the cache. The roundings
are PyTorch's, so alpha 0 adds exact zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cotvalve.engines.slots import Placed
from cotvalve.inlets import Parts


class Split(NamedTuple):
    """How A x is made in the norm's kernel."""

    parts: int
    """Of the columns, so that more warps share the product."""
    warps: int


class Tile(NamedTuple):
    """What one program of the heads' kernel computes."""

    rows: int
    """Tokens of one head."""
    warps: int


SPLITS = (Split(4, 8), Split(4, 16), Split(8, 16))
TILES = (Tile(32, 4), Tile(16, 2), Tile(64, 4), Tile(128, 8))
"""Which ones are fastest is measured on the card."""
WIDEST = 2048
"""Of a norm: 16 rows of it lie in a block's registers."""
Ahead = tuple[Tensor, Tensor]
"""A [r, in] of the layers that read a norm, and their alpha."""


def normed(hidden: Tensor, more: Parts | None, w: Tensor, eps: float, ahead: Ahead | None, split: Split = SPLITS[0]) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden + y + s B t [B, T, W] of a product's parts, its RMS norm times `w`, and alpha * A x [B, T, r] of that norm."""
    from cotvalve.engines.tiles import norm_tile

    hidden, w = hidden.contiguous(), w.contiguous()
    width = hidden.shape[-1]
    rows, columns = hidden.numel() // width, _power(width)
    total, x, thin = hidden, torch.empty_like(hidden), None
    # The kernel wants some tensor for each that is not there.
    y = turned = b = a = alpha = hidden
    stride = rank = 0
    scale = 0.0
    if more is not None:
        y, total = more[0].contiguous(), torch.empty_like(hidden)
        if (thin_ := more[1]) is not None and (up := more[2]) is not None:
            turned, b, scale = thin_, up, more[3]
            stride, rank = turned.stride(0), b.shape[1]
    if ahead is not None:
        a, alpha = ahead[0].contiguous(), ahead[1].reshape(-1).contiguous()
        thin = hidden.new_empty(*hidden.shape[:-1], len(a))
    tile: Any = norm_tile
    tile[(-(-rows // 16),)](
        hidden, y, turned, b, w, a, alpha, total, x, hidden if thin is None else thin,
        rows, width, rows // alpha.numel() if ahead else 1, stride, rank, len(a) if ahead else 0, scale, eps,
        ADD=more is not None, BRANCH=rank > 0, AHEAD=ahead is not None, EIGHTS=not (rank % 8 or stride % 8),
        RANK=_power(rank), RANK_A=_power(len(a) if ahead else 0), ROWS=16, COLUMNS=columns, PARTS=split.parts,
        num_warps=split.warps if ahead else 8 if columns <= 1024 else 16,
    )  # fmt: skip
    return total, x, thin


def fits(a: Tensor) -> bool:
    """Whether A and 16 rows of a norm lie in a block's shared memory."""
    needed = 2 * _power(a.shape[1]) * (16 + _power(len(a)))
    return not a.is_cuda or needed <= torch.cuda.get_device_properties(a.device).shared_memory_per_block_optin


def turned_heads(parts: Sequence[Parts], cos: Tensor, sin: Tensor, placed: Placed | None = None, tile: Tile = TILES[0]) -> list[Tensor]:
    """Queries, keys and values [B, T, heads, D] of the parts of their products [B, T, heads * D], the first two turned by cos
    and sin [B or 1, T, D]. With `placed` keys and values are written there, and only queries are new."""
    from cotvalve.engines.tiles import heads_tile

    rows, tokens = parts[0][0].shape[:2]
    cos, sin = cos.contiguous(), sin.contiguous()
    dim = cos.shape[-1]
    y = [part[0].contiguous() for part in parts]
    heads, others, _ = counts = [one.shape[-1] // dim for one in y]
    out = [one.new_empty(rows, tokens, count, dim) for one, count in zip(y[: 1 if placed else 3], counts, strict=False)]
    out += placed[:2] if placed else ()
    turned = [one if part[1] is None else part[1] for one, part in zip(y, parts, strict=True)]
    b = [one if part[2] is None else part[2] for one, part in zip(y, parts, strict=True)]
    dial = parts[0][1] is not None
    ranks, strides = ([one.shape[1] if dial else 0 for one in b], [one.stride(0) if dial else 0 for one in turned])
    kernel: Any = heads_tile
    kernel[-(-rows * tokens // tile.rows), heads + 2 * others](
        *y, *turned, *b, cos, sin, placed[2] if placed else cos, *out, rows * tokens, tokens, heads, others, dim // 2,
        tokens * dim if len(cos) > 1 else 0, *strides, *ranks, *(part[3] for part in parts), DIAL=dial, PLACED=placed is not None,
        EIGHTS=not any(number % 8 for number in (*ranks, *strides)), RANK=_power(max(ranks)), ROWS=tile.rows, HALF=_power(dim // 2),
        num_warps=tile.warps,
    )  # fmt: skip
    return out


def _power(number: int) -> int:
    """The least power of two from 16 on that holds `number`."""
    return 16 if number <= 16 else 1 << (number - 1).bit_length()
