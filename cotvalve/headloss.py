"""The loss behind a large vocabulary: cross-entropy of the learned positions alone, without keeping any logits.

The gradient of a slice's logits is known as soon as the logits are, so it goes through the output head at once and
only its product, as wide as the hidden states, is kept for the backward pass. Nothing is computed twice. For a head
that is not learned itself; `learner.py` has the way for one that is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

LOSS_SLICE = 2048
"""Learned tokens whose logits exist at a time: 2,048 x 152k x (4 + 2 + 2) bytes = 2.5 GB in bf16."""


def loss_and_slope(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy [N] of `logits` [N, vocabulary] in fp32, and its gradient to them in their own dtype."""
    scores = nn.functional.log_softmax(logits, -1, dtype=torch.float32)
    loss = -scores.gather(1, wanted)[:, 0]
    # d loss / d logits is the softmax, less 1 at the wanted token
    scores.exp_().scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=torch.float32))
    return loss, scores.to(logits.dtype)


@cache
def compiled() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The same in two passes over the logits instead of nine."""

    def fused(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        scores = nn.functional.log_softmax(logits.float(), -1)
        here = torch.arange(logits.shape[1], device=logits.device) == wanted
        return -torch.where(here, scores, 0.0).sum(-1), (scores.exp() - here.float()).to(logits.dtype)

    return torch.compile(fused, dynamic=True)


@dataclass(frozen=True, slots=True)
class Worth:
    """What tokens count for, where examples do not count alike; one number for each learned token."""

    weights: Tensor
    """[N], of either sign."""
    before: Tensor | None = None
    """[N], log p when the chain was sampled. With it a weight is multiplied by the ratio of p now to p then, and counts no
    more once that is `trust` past 1 on the side that the weight pulls to: PPO's clipped objective (arXiv 1707.06347, eq. 7)."""
    trust: float = 0.2

    def __getitem__(self, part: slice) -> Worth:
        return Worth(self.weights[part], None if self.before is None else self.before[part], self.trust)

    def of(self, loss: Tensor) -> Tensor:
        """The objective to be made small, of each token's cross-entropy [N]."""
        if self.before is None:
            return self.weights * loss
        ratio = torch.exp(-loss - self.before)
        return -torch.minimum(ratio * self.weights, ratio.clamp(1 - self.trust, 1 + self.trust) * self.weights)

    def slope(self, loss: Tensor) -> Tensor:
        """d of(loss) / d loss [N]."""
        if self.before is None:
            return self.weights
        ratio = torch.exp(-loss - self.before)
        gone = torch.where(self.weights > 0, ratio > 1 + self.trust, ratio < 1 - self.trust)
        return torch.where(gone, 0.0, ratio * self.weights)


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of `head(states)` against `targets`, in fp32, each token by its worth where there is one."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, worth: Worth | None = None,
        slope: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = loss_and_slope,
    ) -> Tensor:  # fmt: skip
        """states [N, hidden], targets [N], weight [vocabulary, hidden]; `slope` is `loss_and_slope` or `compiled()`."""
        total = states.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        for start in range(0, len(states), LOSS_SLICE):
            part = slice(start, start + LOSS_SLICE)
            loss, to_logits = slope(nn.functional.linear(states[part], weight, bias), targets[part, None])
            total += (loss if worth is None else worth[part].of(loss)).sum()
            if gradient is not None:
                torch.mm(to_logits, weight, out=gradient[part])
                if worth is not None:
                    gradient[part] *= worth[part].slope(loss)[:, None]
            del to_logits
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None, None, None
