"""A decoder layer with one kernel between two products: of a Llama-like one transformers and PEFT make many more.

Only for layers that prove to be that formula, and are faster so, on NVIDIA cards with Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from cotvalve.engines import kernels, slots
from cotvalve.engines.between import TILES, WIDEST, Sums, Tile, normed, turned_heads
from cotvalve.engines.gated import Gated, side
from cotvalve.engines.replaced import Replacement
from cotvalve.inlets import Parts

if TYPE_CHECKING:
    from cotvalve.valve import Dial

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
MANY = 2048
"""Rows of the measurement: a full batch."""
LENGTH = 64
"""Cache positions of each of them."""
OFF = 0.03
"""Share of its norm that a layer's output may be off by. Single numbers tell less: where attention is nearly undecided, a layer's own
bf16 differs from its fp32 by more than that."""
ADDED_OFF = 0.05
"""The same of what the layer adds to its input, which may be little beside it."""


class Stream:
    """The residual sum on its way from layer to layer, with the norm that was taken of it for the next one."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.norm: Tensor | None = None

    def put(self, hidden: Tensor, norm: Tensor) -> Tensor:
        """`hidden`, whose norm is kept."""
        self.hidden, self.norm = hidden, norm
        return hidden

    def take(self, hidden: Tensor) -> Tensor | None:
        """The norm of `hidden`, if that is the sum it was kept for."""
        norm = self.norm if self.hidden is hidden else None
        self.hidden = self.norm = None
        return norm


@dataclass(frozen=True, slots=True)
class Layer:
    """In place of a decoder layer's forward."""

    layer: Any
    general: Callable[..., Tensor]
    """Its own forward."""
    after: Any
    """The norm of the next layer, or the model's last one."""
    dial: Dial | None
    stream: Stream
    tile: Tile = TILES[0]
    ahead: bool = False
    """Whether A x of down_proj is made where its x is, and summed up with what reads it."""

    def __call__(self, hidden: Tensor, *more: Any, **named: Any) -> Tensor:
        """See the layer."""
        layer, attend, mlp = self.layer, self.layer.self_attn, self.layer.mlp
        norm, angles = self.stream.take(hidden), named.get("position_embeddings")
        if more or angles is None or angles[0].shape[-1] != attend.head_dim or torch.is_grad_enabled():
            return self.general(hidden, *more, **named)
        if norm is None:
            norm = _norm(hidden, None, None, layer.input_layernorm)[1]
        parts = [part for name in ATTENTION[:3] if (part := side(getattr(attend, name), self.dial, norm)) is not None]
        if len(parts) < 3:
            return self.general(hidden, **named)
        if len({part[1] is None for part in parts}) > 1:  # a direction of some of them
            parts = [_added(part) for part in parts]
        mixed = self._attend(parts, **named)
        hidden, norm = _norm(hidden, self._parts(attend.o_proj, mixed), None, layer.post_attention_layernorm)
        return self.stream.put(*_norm(hidden, *self._last(mlp, norm), self.after))

    def _parts(self, layer: nn.Module, x: Tensor) -> Parts:
        return side(layer, self.dial, x) or (layer(x), None, None, 0.0)

    def _last(self, mlp: Any, norm: Tensor) -> tuple[Parts, Sums | None]:
        """The parts of down_proj's product."""
        gated = vars(mlp).get("forward")
        if not isinstance(gated, Gated):
            return (mlp(norm), None, None, 0.0), None
        if self.ahead and self.dial is not None and self.dial.alpha is not None and (found := self.dial.inlets.factors(mlp.down_proj, norm)):
            a, b, scale = found
            if made := gated.ahead(norm, a):
                inner, sums = made
                return (mlp.down_proj.base_layer(inner), None, b, scale), Sums(sums, self.dial.shaped(norm))
        inner = gated.inner(norm)
        return (self._parts(mlp.down_proj, inner) if inner is not None else (mlp(norm), None, None, 0.0)), None

    def _attend(self, parts: Sequence[Parts], **named: Any) -> Tensor:
        attend = self.layer.self_attn
        angles, mask, cache = (named.pop(name, None) for name in ("position_embeddings", "attention_mask", "past_key_values"))
        rows, tokens = parts[0][0].shape[:2]
        slot = None if cache is None or tokens > 1 else cache.layers[attend.layer_idx]
        placed = slot.placed() if isinstance(slot, slots.SlotLayer) else None
        cos, sin = angles
        query, key, value = turned_heads(parts, cos, sin, placed, self.tile)
        query = query.transpose(1, 2)
        if placed is not None:
            key, value = slot.keys, slot.values  # pyright: ignore[reportOptionalMemberAccess]
        else:
            key, value = key.transpose(1, 2), value.transpose(1, 2)
            key, value = (key, value) if cache is None else cache.update(key, value, attend.layer_idx)
        mixed, _ = slots.attention(attend, query, key, value, mask, scaling=attend.scaling, dropout=0.0, **named)  # pyright: ignore[reportArgumentType]
        return mixed.reshape(rows, tokens, -1).contiguous()


def _added(part: Parts) -> Parts:
    y, thin, b, scale = part
    if thin is not None and b is not None:
        y.view(-1, y.shape[-1]).addmm_(thin, b.t(), alpha=scale)
    return y, None, None, 0.0


def _norm(hidden: Tensor, more: Parts | None, sums: Sums | None, norm: Any) -> tuple[Tensor, Tensor]:
    return normed(hidden, more, norm.weight, norm.variance_epsilon, sums)


def faster_layers(model: PreTrainedModel, dial: Dial | None) -> Iterator[Replacement]:
    """All layers, and the norm behind the last one, if each proves to be that formula and the first one is faster so."""
    decoder: Any = model.get_decoder()
    layers: list[Any] = list(getattr(decoder, "layers", []))
    last: Any = getattr(decoder, "norm", None)
    alike = bool(layers) and all(map(_alike, layers)) and hasattr(last, "variance_epsilon")
    if not alike or model.config.hidden_size > WIDEST or not slots.reads_rows(model):
        return
    stream, general = Stream(), last.forward
    behind = [layer.input_layernorm for layer in layers[1:]] + [last]
    made = [Layer(layer, layer.forward, after, dial, stream) for layer, after in zip(layers, behind, strict=True)]

    def at(rows: int) -> Any:
        return nullcontext() if dial is None else dial.at(torch.linspace(-1, 1.5, rows))

    with torch.no_grad():
        if not all(_right(one, model, 3, 5) for one in made):
            return
        with at(MANY):
            best = _fastest(made[0], model)
        if best is None:
            return
        made = [replace(one, tile=best.tile, ahead=best.ahead) for one in made]
        with at(3):
            if not all(_right(one, model, 3, 5) for one in made):
                return
        with at(MANY):
            if not _right(made[0], model, MANY, 1):
                return
    yield from ((one.layer, "forward", one) for one in made)
    yield last, "forward", lambda hidden: general(hidden) if (norm := stream.take(hidden)) is None else norm


def _alike(layer: Any) -> bool:
    """Whether its parts are those of a Llama-like layer; whether they compute the same, numbers tell."""
    parts, own = ({name for name, _ in each.named_children()} for each in (layer, getattr(layer, "self_attn", nn.Module())))
    norms = all(hasattr(getattr(layer, name, None), "variance_epsilon") for name in NORMS)
    return parts == {"self_attn", "mlp", *NORMS} and own == {*ATTENTION} and norms and "forward" not in vars(layer) and layer.self_attn.head_dim % 2 == 0


def _fastest(one: Layer, model: PreTrainedModel) -> Layer | None:
    """The layer in the cut that is fastest; None where its own forward is."""
    hidden, named = _sample(one, model, MANY, 1)

    def seconds(layer: Layer) -> float:
        return kernels.seconds(partial(layer, hidden, **named))

    best = min((replace(one, tile=tile) for tile in TILES), key=seconds)
    best = min((replace(best, ahead=ahead) for ahead in ((False, True) if one.dial else (False,))), key=seconds)
    own = kernels.seconds(lambda: one.after(one.general(hidden, **named)))
    return best if seconds(best) < own else None


def _sample(one: Layer, model: PreTrainedModel, rows: int, tokens: int) -> tuple[Tensor, dict[str, Any]]:
    """Something for a layer to read: of one token, with a cache whose slots are half full."""
    draw, attend = torch.Generator().manual_seed(0), one.layer.self_attn

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(model.device, model.dtype)

    hidden, angles = some(rows, tokens, model.config.hidden_size), (some(rows, tokens, attend.head_dim), some(rows, tokens, attend.head_dim))
    named: dict[str, Any] = {"position_embeddings": angles, "attention_mask": None, "past_key_values": None}
    if tokens > 1:
        return hidden, named
    window, numbers = slots.Window(by_token=True), torch.arange(rows + 1, dtype=torch.int32, device=model.device)
    used = numbers[:-1] % (LENGTH // 2) + LENGTH // 4
    window.rows, window.length, window.position = rows, LENGTH, (numbers[:-1] * LENGTH + used).long()
    slot, others = slots.SlotLayer(window, rows, LENGTH), model.config.num_key_value_heads
    slot.lazy_initialization(*[some(1, others, 1, attend.head_dim)] * 2)
    layers = [slots.SlotLayer(window, 0, 0)] * attend.layer_idx + [slot]
    return hidden, named | {"past_key_values": Cache(layers=[*layers]), "ends": slots.Ends(numbers, numbers * LENGTH, (used + 1).int(), LENGTH)}


def _right(one: Layer, model: PreTrainedModel, rows: int, tokens: int) -> bool:
    """Whether output, norm and cache are those of the layer's own forward."""
    (hidden, theirs), (_, ours) = (_sample(one, model, rows, tokens) for _ in range(2))
    wanted, found = one.general(hidden, **theirs), one(hidden, **ours)
    norm = one.stream.take(found)
    pairs = [(found, wanted), (found if norm is None else norm, one.after(wanted))]
    if tokens == 1:
        mine, own = (named["past_key_values"].layers[-1] for named in (ours, theirs))
        pairs += [(mine.keys, own.keys), (mine.values, own.values)]
    added = ((found - hidden).float(), (wanted - hidden).float())
    return all(_near(a.float(), b.float(), OFF) for a, b in pairs) and _near(*added, ADDED_OFF)


def _near(a: Tensor, b: Tensor, off: float) -> bool:
    return bool((a - b).norm() <= off * b.norm())
