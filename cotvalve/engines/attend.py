"""Attention of a decoding step in our own kernel: one query a row, on keys and values that lie token by token.

The flash kernel that comes with PyTorch works on 128 queries at a time, of which a decoding step has as many as query
heads share a key head: 6 or 7. It was a third of a step, three times what reading keys and values takes. This one works
on 16. Which is faster, and with which tiles, is measured on the card before either is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cotvalve.engines import kernels, slots
from cotvalve.engines.replaced import Replacement
from cotvalve.engines.slots import Ends


class Tile(NamedTuple):
    """How the kernel is cut."""

    keys: int
    """Read at a time."""
    warps: int
    stages: int
    """Blocks of keys that are on their way at once."""


TILES = (Tile(32, 1, 4), Tile(64, 2, 3), Tile(64, 4, 3), Tile(128, 4, 2))
WIDEST = 64
"""Query heads that share a key head, at most."""
LOADS = ((8, 4096), (512, 512))
"""Rows and cache positions of the measurements: a server with a few long chains, and a batch whose chains are about half done."""
FEW = 64
"""Rows up to which the first measurement counts."""
Attention = Callable[[Tensor, Tensor, Tensor, Ends, float | None], Tensor]


def faster_attention(model: PreTrainedModel) -> Iterator[Replacement]:
    """Our kernel in the tiles that are fastest on this card, where it is right and faster than PyTorch's."""
    config: Any = model.config.get_text_config()
    heads = config.num_attention_heads
    others = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads % others or heads // others > WIDEST or not slots.reads_rows(model):
        return
    few, many = (_fastest(_sample(*load, heads, others, dim, model)) for load in LOADS)
    if few is not slots.read_rows or many is not slots.read_rows:
        yield slots, "read_rows", partial(_by_load, few, many)


def _by_load(few: Attention, many: Attention, query: Tensor, key: Tensor, value: Tensor, ends: Ends, scaling: float | None) -> Tensor:
    return (few if len(query) <= FEW else many)(query, key, value, ends, scaling)


def _fastest(sample: tuple[Tensor, Tensor, Tensor, Ends]) -> Attention:
    best: Attention = slots.read_rows
    wanted, least = best(*sample, None).float(), kernels.seconds(partial(best, *sample, None))
    for tile in TILES:
        ours = partial(attended, tile)
        took = kernels.seconds(partial(ours, *sample, None))
        if took < least and torch.allclose(ours(*sample, None).float(), wanted, rtol=0.02, atol=0.01):
            best, least = ours, took
    return best


def _sample(rows: int, length: int, heads: int, others: int, dim: int, model: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor, Ends]:
    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, device=model.device, dtype=model.dtype)

    numbers = torch.arange(rows + 1, dtype=torch.int32, device=model.device)
    used = length - numbers[:-1] * 7 % length  # few rows nearly full, many of every length
    return some(rows, heads, dim), some(rows * length, others, dim), some(rows * length, others, dim), Ends(numbers, numbers * length, used, length)


def attended(tile: Tile, query: Tensor, key: Tensor, value: Tensor, ends: Ends, scaling: float | None) -> Tensor:
    """What `slots.read_rows` gives: query [B, H, D], keys and values [slots * length, K, D], each row up to its end; [B, H, D]."""
    from cotvalve.engines.tiles import attend_tile

    rows, heads, dim = query.shape
    others = key.shape[1]
    out = query.new_empty(rows, heads, dim)
    scale = (1 / math.sqrt(dim) if scaling is None else scaling) * math.log2(math.e)
    kernel: Any = attend_tile
    kernel[(rows, others)](
        query, key, value, ends.used, out, ends.length, dim, heads // others, scale, *query.stride()[:2], *key.stride()[:2],
        SHARED=kernels.power(heads // others), DIM=kernels.power(dim), KEYS=tile.keys,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
