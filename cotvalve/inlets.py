"""alpha * A x of LoRA layers without gradients, in as few small products as it needs: a step has hundreds of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, TypeGuard

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from cotvalve.errors import SettingError

ADAPTER = "default"
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers side by side that read one and the same input, so that A x is one product for all of them."""
JOINED = {"cuda"}
"""Where A x is: a small product costs a GPU as much as a large one. Elsewhere the bits stay those of PEFT's own layers."""
TAME = 2.0**40
"""Factors of a smaller norm cannot make A x infinite in bf16 or fp32 where the base model's own W x is not."""


Turned = Callable[[Tensor, Tensor], Tensor]
"""alpha * A x of x [..., in] and A [r, in]."""
Branch = Callable[[Tensor, Tensor, Tensor, Sequence[tuple[Tensor, Tensor, float]]], None]
"""Adds s B (alpha A x) in place: of x, A of all layers of an inlet, alpha, and each layer's W x, B and s."""
Beside = Callable[[Callable[[], Tensor], Callable[[], Tensor]], tuple[Tensor, Tensor]]
"""The results of two pieces of work that may run at once."""
FEW = 4096
"""Rows up to which a product is mostly the start of its kernel."""


def weight(side: nn.Module) -> Tensor:
    """The weight of A or B, found without the detours that cost a small model's step a tenth of its time."""
    return side._parameters["weight"]  # pyright: ignore


def positions(alpha: Any) -> Tensor:
    """`alpha` as a tensor: a number, one per row [B] or one per token [B, T]; SettingError for anything else."""
    made = alpha
    if not isinstance(alpha, Tensor):
        try:
            made = torch.tensor(alpha, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise SettingError(f"alpha is {alpha!r}; expected a number, or one per row or token") from None
        if not made.isfinite().all():
            raise SettingError(f"alpha is {made.tolist()}; expected finite numbers")
    if made.ndim > 2 or made.is_complex() or not made.numel():
        raise SettingError(f"alpha has the shape {list(made.shape)} and is {made.dtype}; expected a number, one per row [B] or one per token [B, T]")
    return made


class Inlet:
    """A of the layers that read the same input, one below the other."""

    def __init__(self, layers: Sequence[LoraLinear], names: Sequence[str]) -> None:
        """`names` are those that layers of this input go by."""
        self.layers, self.names = layers, names
        self.down: Tensor | None = None
        """[sum of ranks, in], or None where the layers' A cannot be one matrix."""
        self.branch: Branch | None = None
        """An engine's kernel for few rows."""
        self.beside: Beside | None = None
        """An engine's way to make A x while the card makes W x, for few rows."""
        self.copies: Sequence[Tensor] = ()
        """A of each layer where an engine has it once more."""
        self.forget()

    def read(self) -> None:
        """Takes the layers' A as they are now."""
        sides = [weight(layer.lora_A[ADAPTER]).detach() for layer in self.layers]
        alike = len({(side.shape[1], side.dtype, side.device) for side in sides}) == 1
        joined = alike and len(sides) > 1 and sides[0].device.type in JOINED
        with torch.inference_mode(False), torch.no_grad():
            # Into the same memory where it fits: a captured graph goes on reading it.
            same = joined and self.down is not None and self.down.dtype == sides[0].dtype and len(self.down) == sum(map(len, sides))
            self.down = torch.cat(sides, out=self.down) if same else torch.cat(sides) if joined else None
            for copy, side in zip(self.copies, sides, strict=False):
                copy.copy_(side)
        ends = [0, *accumulate(len(side) for side in sides)]
        self.places = dict(zip(self.layers, map(slice, ends, ends[1:]), strict=True))

    def forget(self) -> None:
        """Lets go of the last input."""
        self.x = self.turned = self.made = None

    @property
    def whole(self) -> Tensor | None:
        """A of all layers."""
        return weight(self.layers[0].lora_A[ADAPTER]) if len(self.layers) == 1 else self.down

    def outputs(self, layer: LoraLinear, x: Tensor, alpha: Tensor) -> Tensor:
        """W x + s B (alpha A x) for one of the layers, made with the others' when the first of them asks."""
        assert self.branch is not None
        assert self.whole is not None
        if self.x is not x or self.made is None:
            sides = [(one.base_layer(x), weight(one.lora_B[ADAPTER]), one.scaling[ADAPTER]) for one in self.layers]
            self.branch(x, self.whole, alpha, sides)
            self.x, self.made = x, {one: side[0] for one, side in zip(self.layers, sides, strict=True)}
        out = self.made[layer]
        if layer is self.layers[-1]:
            self.forget()
        return out

    def product(self, layer: LoraLinear, x: Tensor, turned: Turned) -> Tensor:
        """alpha * A x for one of the layers, made with the others' when the first of them asks."""
        if self.down is None:
            return turned(x, weight(layer.lora_A[ADAPTER]))
        if self.x is not x or self.turned is None:
            self.x, self.turned = x, turned(x, self.down)
        out = self.turned[..., self.places[layer]]
        if layer is self.layers[-1]:
            self.forget()
        return out


Parts = tuple[Tensor, Tensor | None, Tensor | None, float]
"""W x, alpha * A x [n, r] and B [out, r], or None where the valve is closed, and B's scale: to be added up."""


class Inlets:
    """The inlets of a dial's layers, and what is known of the factors behind them."""

    def __init__(self, layers: Mapping[str, LoraLayer]) -> None:
        """`layers` by their names in the model."""
        self.sides = [side[ADAPTER] for layer in layers.values() for side in (layer.lora_A, layer.lora_B)]
        self.of = _by_layer({name: layer for name, layer in layers.items() if type(layer) is LoraLinear})
        """The inlet of each plain LoRA layer."""
        self.finite = self.tame = False
        """Whether A and B of every layer are finite; and small enough that A x cannot be infinite."""
        self._stamp: object = None

    def parts(self, layer: nn.Module, x: Tensor, turned: Turned | None, alpha: Callable[[Tensor], Tensor]) -> Parts | None:
        """The parts of a LoRA layer's output, `turned` None where the valve is closed; None where only PEFT's own forward
        will do: with gradients, or a layer that is not plain LoRA in x's dtype. An engine's kernel leaves nothing to add."""
        if not self.plain(layer, x):
            return None
        b, inlet = weight(layer.lora_B[ADAPTER]), self.of[layer]
        scale: float = layer.scaling[ADAPTER]
        if turned is None:
            return layer.base_layer(x), None, None, scale
        if not self.finite or layer.lora_bias[ADAPTER]:
            return None
        few = x.numel() <= FEW * x.shape[-1]
        if few and inlet.branch is not None and all(_usual(one, x) and not one.lora_bias[ADAPTER] for one in inlet.layers):
            return inlet.outputs(layer, x, alpha(x)), None, None, scale
        if few and inlet.beside is not None:
            y, thin = inlet.beside(partial(layer.base_layer, x), partial(inlet.product, layer, x, turned))
        else:
            y, thin = layer.base_layer(x), inlet.product(layer, x, turned)
        return y, thin.view(-1, b.shape[1]), b, scale

    def factors(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
        """A, B and B's scale, for a kernel that makes alpha * A x itself; None where only PEFT's own forward will do, as in `parts`."""
        if not self.plain(layer, x) or not self.finite or layer.lora_bias[ADAPTER]:
            return None
        return weight(layer.lora_A[ADAPTER]), weight(layer.lora_B[ADAPTER]), layer.scaling[ADAPTER]

    def plain(self, layer: nn.Module, x: Tensor) -> TypeGuard[LoraLinear]:
        """Whether it is a LoRA layer of x's dtype that nothing else acts on, and no gradients are wanted."""
        return type(layer) is LoraLinear and layer in self.of and not torch.is_grad_enabled() and _usual(layer, x)

    def look(self) -> None:
        """Takes note of the factors where they have changed. Read at every step of an engine without graphs: microseconds."""
        for inlet in self.of.values():
            inlet.forget()
        every = [weight(side) for side in self.sides]
        # Tensors of inference mode do not count their changes.
        stamp = None if any(side.is_inference() for side in every) else [(side.data_ptr(), side._version) for side in every]  # pyright: ignore[reportPrivateUsage]
        if stamp is not None and stamp == self._stamp:
            return
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(every)]).tolist()  # pyright: ignore[reportPrivateUsage]
        self._stamp = stamp
        self.finite = all(map(math.isfinite, norms))
        self.tame = self.finite and max(norms) < TAME
        for inlet in self.of.values():
            inlet.read()


def _usual(layer: LoraLinear, x: Tensor) -> bool:
    """Whether it is the adapter and nothing else that acts, in x's dtype."""
    alone = not (layer.disable_adapters or layer.merged) and layer.active_adapters == [ADAPTER]
    # Under autocast W x has another dtype than B, and products in place are not cast.
    return alone and weight(layer.lora_B[ADAPTER]).dtype == x.dtype and not torch.is_autocast_enabled(x.device.type)


def _by_layer(layers: Mapping[str, LoraLinear]) -> dict[LoraLinear, Inlet]:
    found: dict[LoraLinear, Inlet] = {}
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        together = next((names for names in SAME_INPUT if own in names), (own,))
        beside = [layers[sibling] for n in together if (sibling := f"{parent}.{n}".lstrip(".")) in layers]
        if layer not in found:
            found |= dict.fromkeys(beside, Inlet(beside, together))
    return found
