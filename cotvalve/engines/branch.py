"""W x + s B (alpha A x) for all layers that read the same x, in less time: what the dial adds to them as one kernel, or A x beside W x.

With `thin.py` alone a layer's queries, keys and values take four kernels: A x for the three, and B's product for each. A
decoding step of a small model is mostly the number of its kernels. Which way is fastest is measured on the card.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cotvalve.engines import kernels
from cotvalve.engines.replaced import Replacement, replaced
from cotvalve.inlets import ADAPTER, Beside, Branch, Inlet, weight

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
Way = tuple[str, Branch | Beside]
"""An attribute of an inlet and what it is set to."""


def faster_branches(dial: Dial, *, alone: bool = True) -> Iterator[Replacement]:
    """The inlets that are faster, and right, by this kernel or with A x beside W x. Gate and up are added up by the gated kernel;
    where layers are whole (not `alone`) all branches are added by their kernels, and only A x beside W x is tried."""
    device = weight(next(iter(dial.inlets.of)).lora_A[ADAPTER]).device if dial.inlets.of else None
    aside = kernels.aside(device)
    chosen: dict[object, Way | None] = {}
    for inlet in dict.fromkeys(dial.inlets.of.values()):
        if inlet.whole is None or type(inlet.layers[0].base_layer) is not torch.nn.Linear:
            continue
        shape = "gate_proj" in inlet.names, *((layer.in_features, layer.out_features, layer.r[ADAPTER]) for layer in inlet.layers)
        if shape not in chosen:
            chosen[shape] = _fastest(inlet, dial, [*_ways(inlet, aside)] if alone else [("beside", aside)])
        if way := chosen[shape]:
            yield inlet, *way


def _ways(inlet: Inlet, aside: Beside) -> Iterator[Way]:
    yield "beside", aside
    assert inlet.whole is not None
    if "gate_proj" not in inlet.names and len(inlet.layers) <= MOST and len(inlet.whole) <= WIDEST:
        yield from (("branch", partial(branched, spread)) for spread in SPREADS)


def _fastest(inlet: Inlet, dial: Dial, ways: Sequence[Way]) -> Way | None:
    like = weight(inlet.layers[0].lora_A[ADAPTER])
    x = torch.randn(ROWS, 1, like.shape[1], device=like.device, dtype=like.dtype)
    alphas = torch.linspace(-1, 1.5, ROWS, device=like.device)

    def outputs() -> list[Tensor]:
        if "gate_proj" in inlet.names:
            return [part for layer in inlet.layers for part in (dial.parts(layer, x) or ())[:2] if part is not None]
        return [layer(x) for layer in inlet.layers]

    best: Way | None = None
    with torch.no_grad(), dial.at(alphas):
        wanted, least = outputs(), kernels.seconds(outputs)
        for way in ways:
            with replaced([(inlet, *way)]):
                found = outputs()
                right = all(
                    torch.allclose(ours.float(), theirs.float(), rtol=0.02, atol=0.02 * float(theirs.abs().max()))
                    for ours, theirs in zip(found, wanted, strict=True)
                )
                if right and (took := kernels.seconds(outputs)) < least:
                    best, least = way, took
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
    across, tall = kernels.power(rank), 16
    tile: Any = branch_tile
    tile[(-(-rows // tall), spread)](
        flat, a.contiguous(), alpha.reshape(-1).contiguous(), *y, *b, rows, width, rows // alpha.numel(), rank, *wide, *ranks, *scale,
        RANK=across, EIGHTS=not any(rank % 8 for rank in ranks), ROWS=tall, DEEP=256 if tall + across <= 48 else 128, COLUMNS=COLUMNS, num_stages=3,
    )  # fmt: skip
