"""W x of all layers that read the same x, and A x of their branches, as one product: A stands below W in memory.

A small product costs a decoding step as much as the start of its kernel; as some more columns of a large one it is
nearly free. The layers' weights become views of the joined matrix, so it takes no memory beside A. alpha is left to the
kernel that adds the branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from cotvalve.inlets import ADAPTER, Inlet, Parts, weight

if TYPE_CHECKING:
    from cotvalve.valve import Dial

EIGHT = 8
"""Rows that each A fills up to, so that every part of the product begins where 16 bytes do; all rows together fill up to twice as many."""
LINE = 64
"""Rows that those of several layers fill up to: a row of the product then begins where 128 bytes of memory do, and the kernels that
read it in pieces of that size touch one line for each. For a single layer that would be columns for nothing."""


class Sides(NamedTuple):
    """The parts of the outputs of layers that read the same input."""

    parts: list[Parts]
    alpha: Tensor | None = None
    """What A x is still to be multiplied by."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Joined:
    """Layers and their joined matrix."""

    layers: tuple[Any, ...]
    inlet: Inlet | None
    """Of their branches; None where they have none."""
    matrix: Tensor
    """[columns of all layers and A of each, in]: W of each layer first."""
    bias: Tensor | None
    wide: tuple[slice, ...]
    """Rows of each W."""
    thin: tuple[slice, ...]
    """Rows of each A."""

    def attach(self) -> None:
        """Makes the layers' weights and biases views of the joined ones, and has the matrix follow their A."""
        with torch.inference_mode(False), torch.no_grad():
            for layer, rows in zip(self.layers, self.wide, strict=True):
                base = _base(layer)
                weight(base).data = self.matrix[rows]
                if base.bias is not None and self.bias is not None:
                    base.bias.data = self.bias[rows]
            if self.inlet is not None:
                self.inlet.copies = [self.matrix[rows] for rows in self.thin]
                self.inlet.read()
        _KNOWN[id(_base(self.layers[0]))] = self

    @property
    def attached(self) -> bool:
        """Whether the weights are still its views: a model that was moved to another device has new ones."""
        where = [self.matrix[rows].data_ptr() for rows in self.wide]
        return all(weight(_base(layer)).data_ptr() == at for layer, at in zip(self.layers, where, strict=True))

    def sides(self, dial: Dial | None, x: Tensor) -> Sides | None:
        """The parts of all layers' outputs; None where they have to be made apart."""
        found: list[tuple[Tensor, Tensor, float]] = []
        if torch.is_grad_enabled():
            return None
        if dial is not None and self.inlet is not None:
            if not all(dial.inlets.plain(layer, x) for layer in self.layers):
                return None
            if dial.alpha is not None:
                found = [side for layer in self.layers if (side := dial.inlets.factors(layer, x)) is not None]
                if len(found) < len(self.layers):
                    return None
        y = linear(x, self.matrix, self.bias)
        whole = [y[..., rows] for rows in self.wide]
        if not found or dial is None:
            return Sides([(one, None, None, 0.0) for one in whole])
        flat = y.view(-1, y.shape[-1])
        return Sides([(one, flat[:, rows], *side[1:]) for one, rows, side in zip(whole, self.thin, found, strict=True)], dial.shaped(x))


_KNOWN: WeakValueDictionary[int, Joined] = WeakValueDictionary()
"""What is attached, by the id of its first layer: another engine of the same model goes on with it."""


def join(layers: Sequence[nn.Module], dial: Dial | None) -> Joined | None:
    """The layers' joined matrix, a copy until it is attached; None where they cannot be joined or nothing is gained."""
    bases = [_base(layer) for layer in layers]
    inlets = {None if dial is None else dial.inlets.of.get(layer) for layer in layers}  # pyright: ignore[reportArgumentType, reportCallIssue]
    like = weight(bases[0])
    if len(inlets) > 1 or not all(type(base) is nn.Linear and base.out_features % EIGHT == 0 for base in bases):
        return None
    if any((weight(base).shape[1:], weight(base).dtype, weight(base).device) != (like.shape[1:], like.dtype, like.device) for base in bases):
        return None
    (inlet,) = inlets
    if len(layers) == 1 if inlet is None else tuple(inlet.layers) != tuple(layers):
        return None
    known = _KNOWN.get(id(bases[0]))
    if known is not None and known.layers == tuple(layers) and known.inlet is inlet and known.attached:
        return known
    with torch.inference_mode(False), torch.no_grad():
        rows = [weight(base) for base in bases]
        if inlet is not None:
            sides = [weight(layer.lora_A[ADAPTER]) for layer in inlet.layers]
            rows += [pad(side, (0, 0, 0, -len(side) % EIGHT)) for side in sides]
        starts = [0, *accumulate(map(len, rows))]
        rows.append(like.new_zeros(-starts[-1] % (LINE if len(layers) > 1 else 2 * EIGHT), like.shape[1]))
        matrix, bias = torch.cat(rows).detach(), None
        if any(base.bias is not None for base in bases):
            bias = like.new_zeros(len(matrix))
            for base, start in zip(bases, starts, strict=False):
                if base.bias is not None:
                    bias[start : start + base.out_features] = base.bias
    wide = tuple(slice(start, start + base.out_features) for base, start in zip(bases, starts, strict=False))
    ranks = [] if inlet is None else [layer.r[ADAPTER] for layer in inlet.layers]
    thin = tuple(slice(start, start + rank) for rank, start in zip(ranks, starts[len(bases) :], strict=False))
    return Joined(tuple(layers), inlet, matrix, bias, wide, thin)


def _base(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer)
