"""W x + s B (alpha A x) for all layers that read the same x: all that the dial adds to them is one kernel.

With `thin.py` alone a layer's queries, keys and values take four: A x for the three, and B's product for each. A decoding
step of a small model is mostly the number of its kernels. Whether one is faster is measured on the card, for each width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cotvalve.engines import kernels
from cotvalve.engines.replaced import Replacement
from cotvalve.inlets import ADAPTER, Branch, Inlet, weight

if TYPE_CHECKING:
    from cotvalve.valve import Dial

MOST = 3
"""Layers that one kernel serves."""
WIDEST = 64
"""Ranks of all layers together, at most."""
COLUMNS = 128
"""Of a tile."""
ROWS = 2048
"""Of the measurement: a full batch."""
SPREADS = (1, 3)
"""Programs that may share one row tile's columns."""


def faster_branches(dial: Dial) -> Iterator[Replacement]:
    """The inlets whose layers the kernel computes right and faster. Gate and up are the gated kernel's."""
    chosen: dict[object, Branch | None] = {}
    for inlet in dict.fromkeys(dial.inlets.of.values()):
        if "gate_proj" in inlet.names or not _fits(inlet):
            continue
        shape = tuple((layer.in_features, layer.out_features, layer.r[ADAPTER]) for layer in inlet.layers)
        if shape not in chosen:
            chosen[shape] = _fastest(inlet, dial)
        if chosen[shape] is not None:
            yield inlet, "branch", chosen[shape]  # pyright: ignore[reportReturnType]


def _fits(inlet: Inlet) -> bool:
    return inlet.whole is not None and len(inlet.layers) <= MOST and len(inlet.whole) <= WIDEST and type(inlet.layers[0].base_layer) is torch.nn.Linear


def _fastest(inlet: Inlet, dial: Dial) -> Branch | None:
    like = weight(inlet.layers[0].lora_A[ADAPTER])
    x = torch.randn(ROWS, 1, like.shape[1], device=like.device, dtype=like.dtype)
    alphas = torch.linspace(-1, 1.5, ROWS, device=like.device)

    def outputs() -> list[Tensor]:
        return [layer(x) for layer in inlet.layers]

    best: Branch | None = None
    with torch.no_grad(), dial.at(alphas):
        wanted, least = outputs(), kernels.seconds(outputs)
        for spread in SPREADS:
            inlet.branch = partial(branched, spread)
            try:
                right = all(
                    torch.allclose(ours.float(), theirs.float(), rtol=0.02, atol=0.02 * float(theirs.abs().max()))
                    for ours, theirs in zip(outputs(), wanted, strict=True)
                )
                if right and (took := kernels.seconds(outputs)) < least:
                    best, least = inlet.branch, took
            finally:
                inlet.branch = None
                inlet.forget()
    return best


def branched(spread: int, x: Tensor, a: Tensor, alpha: Tensor, sides: Sequence[tuple[Tensor, Tensor, float]]) -> None:
    """Adds s B (alpha A x) to each side's y [..., out], in place: x [..., in], A [sum of ranks, in], sides (y, B [out, r], s).

    alpha is one for all, per row [B, 1, 1] or per token [B, T, 1]. Rounded where PyTorch's separate products are.
    """
    from cotvalve.engines.tiles import branch_tile

    rank, width = a.shape
    flat = x.reshape(-1, width).contiguous()
    rows = len(flat)
    # Layers that are not there have no columns; the kernel wants some tensor for each.
    y, b, scale = (list(column) for column in zip(*sides, *[(flat, flat, 0.0)] * (MOST - len(sides)), strict=True))
    wide = [side[1].shape[0] for side in sides] + [0] * (MOST - len(sides))
    ranks = [side[1].shape[1] for side in sides] + [0] * (MOST - len(sides))
    across, tall = max(16, 1 << (rank - 1).bit_length()), 16
    tile: Any = branch_tile
    tile[(-(-rows // tall), spread)](
        flat, a.contiguous(), alpha.reshape(-1).contiguous(), *y, *b, rows, width, rows // alpha.numel(), rank, *wide, *ranks, *scale,
        RANK=across, ROWS=tall, DEEP=256 if tall + across <= 48 else 128, COLUMNS=COLUMNS, num_stages=3,
    )  # fmt: skip
