"""silu(gate x) * (up x) with the dial inside, in one kernel: the widest tensors of a layer pass the memory once.

What transformers and PEFT do one after the other, add B's product to gate and to up, take silu, multiply, reads and
writes those tensors nine times; on a GPU that is most of what the dial costs. The roundings are theirs, so alpha 0 adds
exact zeros here too. Only for layers that prove to be that formula, on NVIDIA cards where Triton is (it comes with torch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from cotvalve.engines import kernels
from cotvalve.engines.replaced import Replacement
from cotvalve.inlets import Parts

if TYPE_CHECKING:
    from cotvalve.valve import Dial


class Tile(NamedTuple):
    """What one program computes."""

    rows: int
    columns: int
    warps: int


TILES = (Tile(32, 128, 4), Tile(64, 64, 4), Tile(16, 256, 4), Tile(64, 128, 8), Tile(16, 512, 8), Tile(32, 256, 8))
"""Which one is fastest is measured on the card, for each shape."""
MANY = 2048
"""Rows of that measurement: a full batch."""
PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


def gated_layers(model: nn.Module, dial: Dial | None) -> Iterator[Replacement]:
    """Layers of that formula, computed by the kernel."""
    best: dict[torch.Size, Tile] = {}
    for module in model.modules():
        if found := _gated(module, dial, best):
            yield found


def _gated(module: Any, dial: Dial | None, best: dict[torch.Size, Tile]) -> Replacement | None:
    if not all(hasattr(module, part) for part in PARTS) or "forward" in vars(module):
        return None
    if type(module.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return None
    base = getattr(module.gate_proj, "base_layer", module.gate_proj)
    if type(base) is not nn.Linear:  # quantized, for one
        return None
    weight = base.weight
    if weight.shape not in best:
        best[weight.shape] = _fastest(module, dial, weight)
    fused = Gated(module, module.forward, dial, best[weight.shape])
    # Names are not enough (some models scale or clamp in between), and neither is one card's Triton for another's.
    sample = torch.linspace(-2, 2, 3 * weight.shape[-1], device=weight.device, dtype=weight.dtype).view(1, 3, -1)
    for position in (nullcontext(), nullcontext() if dial is None else dial.at(1.0)):
        with torch.no_grad(), position:
            wanted, found = module(sample).float(), fused(sample).float()
        if not torch.allclose(found, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max())):
            return None
    return module, "forward", fused


def _fastest(module: Any, dial: Dial | None, like: Tensor) -> Tile:
    x = torch.randn(MANY, 1, like.shape[1], device=like.device, dtype=like.dtype)
    with torch.no_grad(), nullcontext() if dial is None else dial.at(torch.linspace(-1, 1.5, MANY, device=like.device)):
        gate, up = _sides(module, dial, x)
        if gate is None or up is None or (gate[1] is None) != (up[1] is None):
            return TILES[0]
        return min(TILES, key=lambda tile: kernels.seconds(partial(gated, gate, up, tile)))


@dataclass(frozen=True, slots=True)
class Gated:
    """In place of a layer's forward."""

    module: Any
    general: Callable[[Tensor], Tensor]
    """The layer's own forward."""
    dial: Dial | None
    tile: Tile

    def __call__(self, x: Tensor) -> Tensor:
        """See the layer."""
        inner = self.inner(x)
        return self.general(x) if inner is None else self.module.down_proj(inner)

    def inner(self, x: Tensor) -> Tensor | None:
        """What down_proj reads; None where only the layer's own forward will do."""
        sides = self.sides(x)
        return gated(*sides, self.tile) if sides else None

    def sides(self, x: Tensor) -> tuple[Parts, Parts] | None:
        """The parts of gate and up; None where only the layer's own forward will do."""
        if torch.is_grad_enabled():
            return None
        gate, up = _sides(self.module, self.dial, x)
        return None if gate is None or up is None or (gate[1] is None) != (up[1] is None) else (gate, up)


def _sides(module: Any, dial: Dial | None, x: Tensor) -> list[Parts | None]:
    return [side(layer, dial, x) for layer in (module.gate_proj, module.up_proj)]


def side(layer: nn.Module, dial: Dial | None, x: Tensor) -> Parts | None:
    """The parts of a linear layer's output, with the dial or without one; None where they cannot be told apart."""
    if type(layer) is nn.Linear:
        return layer(x), None, None, 0.0
    return dial.parts(layer, x) if dial is not None else None


def gated(gate: Parts, up: Parts, tile: Tile = TILES[0], alpha: Tensor | None = None) -> Tensor:
    """silu(W_g x + s_g B_g t_g) * (W_u x + s_u B_u t_u), rounded to the tensors' dtype where PyTorch would. With `alpha`
    (one for all, per row or per token) t is still to be multiplied by that."""
    return _gated_by(gate, up, tile, alpha, None)[0]


def gated_ahead(gate: Parts, up: Parts, tile: Tile, alpha: Tensor | None, a: Tensor) -> tuple[Tensor, Tensor]:
    """`gated` and A of it, A [r, width] of the layer that reads it: in parts to be summed up, fp32 [blocks of columns, rows, 16 or more]."""
    out, sums = _gated_by(gate, up, tile, alpha, a)
    assert sums is not None
    return out, sums


def _gated_by(gate: Parts, up: Parts, tile: Tile, alpha: Tensor | None, a: Tensor | None) -> tuple[Tensor, Tensor | None]:
    from cotvalve.engines.tiles import gated_tile

    y, u, width = kernels.by_rows(gate[0]), kernels.by_rows(up[0]), gate[0].shape[-1]
    rows = len(y)
    assert y.stride() == u.stride()
    out = y.new_empty(gate[0].shape)
    blocks, rank_a = -(-width // tile.columns), 0 if a is None else len(a)
    sums = None if a is None else torch.empty(blocks, rows, kernels.power(rank_a), dtype=torch.float32, device=y.device)
    # Where the valve is closed nothing is read of the branches; the kernel wants some tensor for each.
    turned_g, b_g, turned_u, b_u = (y if tensor is None else tensor for tensor in (gate[1], gate[2], up[1], up[2]))
    dial = gate[1] is not None
    ranks = [b.shape[1] if dial else 1 for b in (b_g, b_u)]
    strides = [turned_g.stride(0), turned_u.stride(0)]
    by, tokens, late = kernels.turns(alpha, y, rows)
    tiles: Any = gated_tile
    tiles[-(-rows // tile.rows), blocks](
        y, u, turned_g, b_g, turned_u, b_u, by, out, y if a is None else a.contiguous(), y if sums is None else sums,
        rows, width, y.stride(0), tokens, *strides, gate[3], up[3], *ranks, rank_a, RANK=kernels.power(max(ranks)), RANK_A=kernels.power(rank_a),
        EIGHTS=not any(number % 8 for number in (*ranks, *strides)), DIAL=dial, LATE=late and dial, AHEAD=a is not None, ROWS=tile.rows, COLUMNS=tile.columns,
        num_warps=tile.warps,
    )  # fmt: skip
    return out, sums
