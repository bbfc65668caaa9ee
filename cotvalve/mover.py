"""A model moved along an exact task vector, from one alpha to the next, in place: one pass over the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cotvalve.taskvector import FLOATS, TaskVector, exact, untie
from cotvalve.weights import Anatomy, Held, Loaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = {"cuda": 2**23, "cpu": 2**17}
"""Values moved at a time where numbers change their format on the way: what lies between never leaves the cache."""
SPARE = 4 << 30
"""Bytes of a GPU that keeping both ends beside the model must leave free."""


class Mover:
    """A model and the vector it is moved along: checked once, and on a GPU with both ends beside it, so that a move is
    one pass over them and nothing is read again."""

    def __init__(self, vector: TaskVector, model: PreTrainedModel, *, near: bool = True) -> None:
        """`near` keeps both ends on the model's GPU where SPARE bytes stay free. Raises DirectionMismatch as `check_fits` does."""
        vector.check_fits(model)
        for name in vector.moves.keys() & Anatomy.of(model).tied.keys():
            untie(model, name)
        state = model.state_dict(keep_vars=True)
        self.written = {name: state[name] for name in vector.moves}
        """The model's own tensors by name."""
        near = near and model.device.type == "cuda"
        if near:
            bytes_moved = sum(tensor.numel() * tensor.element_size() for tensor in self.written.values())
            near = torch.cuda.mem_get_info(model.device)[0] > SPARE + 2 * bytes_moved
        self.vector = self._near(vector, model.device) if near else vector
        for side in (self.vector.start, self.vector.end):
            if isinstance(side, Loaded):
                side.keep(self.written.values())

    def _near(self, vector: TaskVector, device: torch.device) -> TaskVector:
        written, moves = list(self.written.values()), vector.moves.values()
        start = Held(vector.start, {move.start for move in moves}, device, written)
        if isinstance(vector.end, Mapping):
            return replace(vector, start=start, end={name: delta.to(device) for name, delta in vector.end.items()})
        return replace(vector, start=start, end=Held(vector.end, {move.end for move in moves}, device, written))

    @torch.no_grad()
    def to(self, alpha: float) -> None:
        """Writes theta1 + alpha * (theta2 - theta1) over the model."""
        for name, tensor in self.written.items():
            self._write(name, alpha, tensor)

    def _write(self, name: str, alpha: float, into: Tensor) -> None:
        """`TaskVector.at` of one tensor, into the model's own."""
        vector, move = self.vector, self.vector.moves[name]
        if alpha in (0, 1) or move.rows is not None or isinstance(vector.end, Mapping) or not into.is_contiguous():
            into.copy_(vector.at(name, alpha, into.device))
            return
        start, end = (side.read(own).to(into.device).contiguous() for side, own in ((vector.start, move.start), (vector.end, move.end)))
        if start.dtype == end.dtype == into.dtype and into.dtype in FLOATS:
            # In 16 bits too lerp computes in fp32 and rounds once: the same bits, in one pass.
            torch.lerp(start, end, alpha, out=into)
            return
        size = CHUNK.get(into.device.type, CHUNK["cpu"])
        for a, b, out in zip(*(tensor.view(-1).split(size) for tensor in (start, end, into)), strict=True):
            first, last = exact(a, vector.start.name, name), exact(b, vector.end.name, name)
            wide = torch.promote_types(first.dtype, last.dtype)
            out.copy_(torch.lerp(first.to(wide), last.to(wide), alpha))
