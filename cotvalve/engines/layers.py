"""A decoder layer with one kernel between two products: of a Llama-like one transformers and PEFT make many more.

Only for layers that prove to be that formula, and are faster so, on NVIDIA cards with Triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from cotvalve.engines import kernels, slots
from cotvalve.engines.between import TILES, WIDEST, Tile, normed, turned_heads
from cotvalve.engines.gated import Gated, gated, gated_ahead, side
from cotvalve.engines.joined import Joined, Sides, join
from cotvalve.engines.replaced import Replacement
from cotvalve.inlets import Parts

if TYPE_CHECKING:
    from cotvalve.valve import Dial

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GROUPS = (("self_attn", ATTENTION[:3]), ("self_attn", ("o_proj",)), ("mlp", ("gate_proj", "up_proj")), ("mlp", ("down_proj",)))
"""Layers that read the same input."""
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


class Joins(NamedTuple):
    """What is one product, of queries, keys and values, of O, of gate and up, of down_proj; None where they are made apart."""

    heads: Joined | None = None
    mixed: Joined | None = None
    gate: Joined | None = None
    down: Joined | None = None


APART = Joins()
JOINT = {"heads": "q, k and v", "mixed": "o and its A x", "gate": "gate and up", "down": "down and its A x"}
"""What each is, in a run's facts."""


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
    joins: Joins = APART
    """What is one product."""

    def __call__(self, hidden: Tensor, *more: Any, **named: Any) -> Tensor:
        """See the layer."""
        layer, attend, mlp = self.layer, self.layer.self_attn, self.layer.mlp
        norm, angles = self.stream.take(hidden), named.get("position_embeddings")
        if more or angles is None or angles[0].shape[-1] != attend.head_dim or torch.is_grad_enabled():
            return self.general(hidden, *more, **named)
        if norm is None:
            norm = _norm(hidden, None, None, layer.input_layernorm)[1]
        heads = self._sides(self.joins.heads, [getattr(attend, name) for name in ATTENTION[:3]], norm)
        if heads is None:
            return self.general(hidden, **named)
        if len({part[1] is None for part in heads.parts}) > 1:  # a direction of some of them
            heads = Sides([_added(part) for part in heads.parts])
        mixed = self._attend(heads, **named)
        hidden, norm = _norm(hidden, self._one(self.joins.mixed, attend.o_proj, mixed), None, layer.post_attention_layernorm)
        return self.stream.put(*_norm(hidden, *self._last(mlp, norm), self.after))

    def _sides(self, joined: Joined | None, layers: Sequence[nn.Module], x: Tensor) -> Sides | None:
        """The parts of their outputs; None where one of them cannot be told apart."""
        if joined is not None and (found := joined.sides(self.dial, x)) is not None:
            return found
        parts = [part for layer in layers if (part := side(layer, self.dial, x)) is not None]
        return Sides(parts) if len(parts) == len(layers) else None

    def _one(self, joined: Joined | None, layer: nn.Module, x: Tensor) -> Sides:
        return self._sides(joined, [layer], x) or Sides([(layer(x), None, None, 0.0)])

    def _last(self, mlp: Any, norm: Tensor) -> tuple[Sides, Tensor | None]:
        """The parts of down_proj's product; and A x of it, where that is in parts to be summed up."""
        inside = vars(mlp).get("forward")
        if not isinstance(inside, Gated):
            return Sides([(mlp(norm), None, None, 0.0)]), None
        sides = None if self.joins.gate is None else self.joins.gate.sides(self.dial, norm)
        if sides is None:
            if (apart := inside.sides(norm)) is None:
                return Sides([(mlp(norm), None, None, 0.0)]), None
            sides = Sides([*apart])
        gate, up = sides.parts
        if self.ahead and self.dial is not None and self.dial.alpha is not None and (found := self.dial.inlets.factors(mlp.down_proj, norm)):
            a, b, scale = found
            inner, sums = gated_ahead(gate, up, inside.tile, sides.alpha, a)
            return Sides([(mlp.down_proj.base_layer(inner), None, b, scale)], self.dial.shaped(norm)), sums
        return self._one(self.joins.down, mlp.down_proj, gated(gate, up, inside.tile, sides.alpha)), None

    def _attend(self, heads: Sides, **named: Any) -> Tensor:
        attend = self.layer.self_attn
        angles, mask, cache = (named.pop(name, None) for name in ("position_embeddings", "attention_mask", "past_key_values"))
        rows, tokens = heads.parts[0][0].shape[:2]
        slot = None if cache is None or tokens > 1 else cache.layers[attend.layer_idx]
        placed = slot.placed() if isinstance(slot, slots.SlotLayer) else None
        cos, sin = angles
        query, key, value = turned_heads(heads.parts, cos, sin, placed, self.tile, heads.alpha)
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


def _norm(hidden: Tensor, more: Sides | None, sums: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    part, alpha = (None, None) if more is None else (more.parts[0], more.alpha)
    return normed(hidden, part, norm.weight, norm.variance_epsilon, sums, alpha)


def faster_layers(model: PreTrainedModel, dial: Dial | None, *, joining: bool = True) -> Iterator[Replacement]:
    """All layers, and the norm behind the last one, if each proves to be that formula and the first one is faster so.

    With `joining` products of one input are joined where that is faster: the model's weights become views of the joined ones.
    """
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
            best = _fastest(made[0], model, joining)
        if best is None:
            return
        made = [replace(one, tile=best.tile, ahead=best.ahead, joins=_joins(one, best.joins)) for one in made]
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


def _joins(one: Layer, like: Joins) -> Joins:
    """The layer's products joined where those of `like` are, for good."""
    joins = Joins(*(None if other is None else join(_group(one, place), one.dial) for place, other in enumerate(like)))
    for joined in joins:
        if joined is not None and not joined.attached:
            joined.attach()
    return joins


def _group(one: Layer, place: int) -> list[nn.Module]:
    part, names = GROUPS[place]
    return [getattr(getattr(one.layer, part), name) for name in names]


def current(found: Iterable[Replacement]) -> bool:
    """Whether the model still has the weights that layers were joined from."""
    joins = [joined for _, _, one in found if isinstance(one, Layer) for joined in one.joins if joined is not None]
    return all(joined.attached for joined in joins)


def joins_of(found: Iterable[Replacement]) -> list[str]:
    """What is one product in the layers among `found`, in words."""
    joins = {name for _, _, one in found if isinstance(one, Layer) for name, joined in one.joins._asdict().items() if joined is not None}
    return [f"one product for {JOINT[name]}" for name in Joins._fields if name in joins]


def _fastest(one: Layer, model: PreTrainedModel, joining: bool) -> Layer | None:
    """The layer in the cut that is fastest; None where its own forward is."""
    hidden, named = _sample(one, model, MANY, 1)

    def seconds(layer: Layer) -> float:
        return kernels.seconds(partial(layer, hidden, **named))

    best = min((replace(one, tile=tile) for tile in TILES), key=seconds)
    best = min((replace(best, ahead=ahead) for ahead in ((False, True) if one.dial else (False,))), key=seconds)
    if (least := seconds(best)) == math.inf:
        return None
    for place, name in enumerate(Joins._fields if joining else ()):
        if (joined := join(_group(one, place), one.dial)) is not None:
            other = replace(best, joins=best.joins._replace(**{name: joined}), ahead=best.ahead and name != "down")
            if (took := seconds(other)) < least:
                best, least = other, took
    own = kernels.seconds(lambda: one.after(one.general(hidden, **named)))
    return best if least < own else None


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
