"""Memory and time from an architecture's numbers: what plan.py adds up. Formulas only, nothing is loaded.

Bytes and GPU-hours are estimates for dense Llama-like models. What cannot be known beforehand is a `Range`.
"""

import math
from dataclasses import dataclass

from cotvalve.architectures import Architecture
from cotvalve.engines.transformers import MOST_SLOTS
from cotvalve.headloss import LOSS_SLICE
from cotvalve.mixchain import Sampling
from cotvalve.train import TOKENS_AT_ONCE, TrainSettings

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU."""

    name: str
    memory: float
    """Usable bytes: what the driver shows, less 5 % that fragments."""
    flops: float
    """Dense bf16 operations per second, as published."""
    bandwidth: float
    """Bytes per second, as published."""


CARDS = (
    Card("80 GB (H100)", 79.2 * GIB * 0.95, 989e12, 3.35e12),
    Card("24 GB (A5000)", 23.6 * GIB * 0.95, 111e12, 0.768e12),
)
"""The paper's two."""


@dataclass(frozen=True, slots=True)
class Range:
    """Between two numbers; both the same for what is known."""

    low: float
    high: float

    @classmethod
    def of(cls, value: float) -> "Range":
        return cls(value, value)

    def __add__(self, other: "Range | float") -> "Range":
        other = other if isinstance(other, Range) else Range.of(other)
        return Range(self.low + other.low, self.high + other.high)

    def __mul__(self, other: "Range | float") -> "Range":
        other = other if isinstance(other, Range) else Range.of(other)
        return Range(self.low * other.low, self.high * other.high)

    def __truediv__(self, other: "Range | float") -> "Range":
        other = other if isinstance(other, Range) else Range.of(other)
        return Range(self.low / other.high, self.high / other.low)

    def capped(self, most: float) -> "Range":
        """Neither end above `most`."""
        return Range(min(self.low, most), min(self.high, most))

    def __str__(self) -> str:
        """Two digits are all an estimate has; a count that is known is said whole.

        >>> str(Range(0.123, 4)), str(Range(1234, 56789)), str(Range.of(7.44e6)), str(Range.of(7473))
        ('0.12 to 4', '1,200 to 57 k', '7.4 M', '7,473')
        """
        if self.low == self.high < 1e5 and self.low == int(self.low):
            return f"{self.low:,.0f}"
        low, high = _short(self.low), _short(self.high)
        return low if low == high else f"{low} to {high}"


def _short(number: float) -> str:
    if not number:
        return "0"
    number = round(number, 1 - math.floor(math.log10(abs(number))))
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= (unit if unit > 1e3 else 1e4):
            return f"{number / unit:,.3g}{name}"
    return f"{number:,.0f}" if number >= 10 else f"{number:g}"


RESERVED = 1.5 * GIB
"""CUDA's context, libraries and workspaces."""


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes while training."""

    weights: float
    learned: float
    """What is learned, its gradient and Adam's two moments, all fp32."""
    kept: Range
    """Activations of as many rows as go through the model at once where memory is no matter."""
    least: float
    """Activations of what the portions shrink to when they do not fit: the longest row, or the micro_batch that was asked for."""
    logits: float

    def cards(self, card: Card) -> int:
        """Cards that hold it with weights and optimizer sharded over them; 0 when the activations alone are too large."""
        rooms = [card.memory - RESERVED - self.logits - kept for kept in (self.kept.high, self.least)]
        return min((math.ceil((self.weights + self.learned) / room) for room in rooms if room > 0), default=0)

    def __str__(self) -> str:
        parts = {"weights": self.weights, "learned with AdamW": self.learned, "slice of logits": self.logits}
        parts = {name: size for name, size in parts.items() if size}
        told = ", ".join(f"{name} {Range.of(size / GIB)}" for name, size in parts.items()) + f", activations {self.kept / GIB}"
        return told + (f" (down to {Range.of(self.least / GIB)} where memory is short)" if self.least < self.kept.low else "")


def training_memory(model: Architecture, settings: TrainSettings, length: Range) -> TrainingMemory:
    """`length`: mean tokens of an example; the longest is taken to be LONGEST times that."""
    longest = settings.max_length if settings.packing else min(settings.max_length, LONGEST * length.high)
    rows = min(settings.batch, settings.micro_batch or max(1, int(TOKENS_AT_ONCE // longest)))
    at_once = Range(min(rows * length.low, rows * longest), rows * longest)
    learned = model.parameters if settings.full else model.lora(settings.rank, settings.modules)
    return TrainingMemory(
        # Full fine-tuning turns the weights themselves into fp32 and works on copies in 16 bits.
        weights=model.parameters * 2.0 if settings.full else model.bytes(settings),
        learned=learned * 16.0,
        kept=at_once * model.kept(settings.gradient_checkpointing) * ALLOCATOR,
        least=longest * (settings.micro_batch or 1) * model.kept(settings.gradient_checkpointing) * ALLOCATOR,
        # 16-bit and fp32 logits and their gradients
        logits=min(LOSS_SLICE, at_once.high) * model.vocabulary * 12.0,
    )


LONGEST = 4
"""Longest example over the mean one: GSM8K's human chains have 122 tokens in the mean and up to 450."""
ALLOCATOR = 1.2
"""Memory in use over memory asked for, at the peak."""


def efficiency(model: Architecture) -> Range:
    """Share of a card's published operations that training reaches: small layers leave a large card idle."""
    return Range(0.15, 0.4) if model.parameters < 4e9 else Range(0.2, 0.45)


def training_hours(model: Architecture, settings: TrainSettings, tokens: Range, length: Range, card: Card) -> Range:
    """GPU-hours for `tokens` in all, in examples of `length`."""
    # One forward pass more for each: activations computed twice; how likely every chain was, where steps are bounded by it.
    again = bool(settings.gradient_checkpointing) + (settings.recipe == "reward" and settings.trust > 0)
    # Forward 2 operations per weight, backward 2 to the activations and, where weights learn, 2 to those.
    weights = (6 if settings.full else 4) + 2 * again
    attention = (3 + again) * 2 * model.layers * model.heads * model.head_dim
    work = tokens * (length * attention + weights * model.multiplied)
    return work / (efficiency(model) * card.flops) / 3600


@dataclass(frozen=True, slots=True)
class SamplingMemory:
    """Bytes while sampling."""

    weights: float
    chain: float
    """Of one slot: keys and values up to the token limit, and its logits."""
    slots: int
    cards: int


def sampling_memory(model: Architecture, settings: Sampling, prompt: int, count: float, card: Card) -> SamplingMemory:
    """As many cards as hold the weights and one chain, and the slots the engine would then take."""
    weights = model.bytes(settings)
    chain = model.cache() * (prompt + settings.max_new_tokens) + model.vocabulary * 16.0
    cards = math.ceil((weights + chain / 0.7) / (card.memory - RESERVED))
    free = cards * (card.memory - RESERVED) - weights
    slots = settings.slots or min(MOST_SLOTS, int(0.7 * free / chain))
    return SamplingMemory(weights, chain, max(1, min(slots, int(count))), cards)


LAUNCH = Range(0.1e-3, 0.6e-3)
"""Seconds of a step and layer beside reading memory, prompts and the processor's part included: 2,048 slots with a LoRA
gave 52,000 tokens a second at 1.5 billion parameters and 94,000 at 0.5 on an H100 (docs/performance.md)."""
BANDWIDTH = Range(0.3, 0.6)
"""Share of the published memory bandwidth that decoding reaches."""


def sampling_hours(model: Architecture, prompt: int, count: float, length: Range, at: SamplingMemory, card: Card) -> Range:
    """GPU-hours for `count` chains of `length` tokens in the mean."""
    context = length * 0.5 + prompt
    read = (context * model.cache() + model.vocabulary * 16) * at.slots + at.weights
    compute = at.slots * 2 * model.multiplied / (0.5 * card.flops)
    one = read / (BANDWIDTH * card.bandwidth)
    step = Range(max(one.low, compute), max(one.high, compute)) / at.cards + LAUNCH * model.layers
    prompts = Range.of(count * prompt * 2 * model.multiplied) / (efficiency(model) * card.flops)
    return (step * length * (count / at.slots) * at.cards + prompts) / 3600


def how() -> list[str]:
    """The formulas in words."""
    return [
        "- Training: 4 operations per weight and token with a LoRA (forward 2, backward 2; frozen weights get no gradient), 6 in full "
        "fine-tuning, 2 more with gradient checkpointing and 2 more where reward has a trust; causal attention 6 x layers x query width x "
        "length (2 more for each of the two). Hours = operations / (published bf16 rate x 20-45 %; 15-40 % below 4 billion parameters).",
        "- Sampling: a step reads the weights and every slot's keys, values and logits at 30-60 % of the published bandwidth (or "
        f"multiplies at half the published rate, if that takes longer), plus {LAUNCH.low * 1e3:g}-{LAUNCH.high * 1e3:g} ms a layer. Hours = steps x tokens / slots.",
        "- Memory in training: weights at 2 bytes (0.52 in 4 bits), 16 bytes for each learned parameter (fp32 with gradient and Adam), "
        f"activations for the rows at once (the longest example {LONGEST} times the mean, at most max_length), {LOSS_SLICE:,} positions of "
        "logits at 12 bytes, 1.5 GiB for CUDA. In sampling: weights, and for each slot 2 x layers x key width x 2 bytes a token.",
        f"- Cards: {', '.join(f'{card.name} {card.flops / 1e12:.0f} Tflop/s, {card.bandwidth / 1e12:g} TB/s' for card in CARDS)}.",
    ]
