"""From logits to a token in one kernel that reads a row from memory once.

PyTorch's argmax takes longer than the reading, and a draw at a temperature is many passes over fp32 copies of the logits.
A draw is the same inversion of the distribution function at the request's own number (`sampling.invert`); only top_p,
which sorts, is left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cotvalve.engines import kernels, sampling
from cotvalve.engines.replaced import Replacement

MANY = 256
"""Rows of the measurement: enough to fill a card, and few enough that PyTorch's copies of their logits fit beside a model."""
BLOCK = 8192
"""Logits at a time."""


def faster_draws(model: PreTrainedModel) -> Iterator[Replacement]:
    """The kernel, where it is right and faster than PyTorch: for greedy rows alone, and where some are sampled."""
    config: Any = model.config.get_text_config()
    logits = torch.randn(MANY, config.vocab_size, device=model.device, dtype=model.dtype)
    uniform = torch.rand(MANY, device=model.device)
    temperature = torch.full((MANY,), 0.7, device=model.device)
    temperature[::8] = 0
    highest = logits.gather(1, drawn(logits)[:, None]) == logits.amax(1, keepdim=True)
    if highest.all() and _seconds(drawn, logits) < _seconds(sampling.greedy, logits):
        yield sampling, "greedy", drawn
    how = uniform, temperature
    right = fair(logits[:16], uniform[:16], temperature[:16], drawn(logits, *how)[:16])
    if right and _seconds(drawn, logits, *how) < _seconds(sampling.sample, logits, *how, None):
        yield sampling, "sample", partial(_sample, sampling.sample)


def _seconds(work: Callable[..., Tensor], *given: Tensor | None) -> float:
    return kernels.seconds(partial(work, *given))


def _sample(general: Callable[..., Tensor], logits: Tensor, uniform: Tensor, temperature: Tensor, top_p: Tensor | None) -> Tensor:
    return drawn(logits, uniform, temperature) if top_p is None else general(logits, uniform, temperature, top_p)


def fair(logits: Tensor, uniform: Tensor, temperature: Tensor, token: Tensor, off: float = 2e-5) -> bool:
    """Whether each token [B] is the one at which the distribution function of its row passes `uniform` [B], `off` or less aside."""
    weights = torch.softmax(logits.double() / temperature.double().clamp_min(1e-6)[:, None], -1)
    own = weights.gather(1, token[:, None])[:, 0]
    reach = weights.cumsum(1).gather(1, token[:, None])[:, 0]
    inside = (reach - own <= uniform + off) & (reach >= uniform - off) & (own > 0)
    greedy = logits.gather(1, token[:, None])[:, 0] == logits.amax(1)
    return bool(torch.where(temperature == 0, greedy, inside).all())


def drawn(logits: Tensor, uniform: Tensor | None = None, temperature: Tensor | None = None) -> Tensor:
    """Token ids [B] of logits [B, V]: the largest, or drawn at `uniform` [B] where `temperature` [B] is above 0."""
    from cotvalve.engines.tiles import draw_tile

    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.long, device=logits.device)
    # The kernel wants some tensor for each that is not there.
    at, heat = (logits if each is None else each.contiguous() for each in (uniform, temperature))
    tile: Any = draw_tile
    tile[(rows,)](
        logits, at, heat, out, vocab, logits.stride(0), SAMPLED=uniform is not None, BLOCK=min(BLOCK, kernels.power(vocab)), num_warps=16,
    )  # fmt: skip
    return out
