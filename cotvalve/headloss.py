"""The loss behind a large vocabulary: cross-entropy of the learned positions alone, without keeping any logits.

The gradient of a slice's logits is known as soon as the logits are, so it goes through the output head at once and
only its product, as wide as the hidden states, is kept for the backward pass. Nothing is computed twice. For a head
that is not learned itself; `learner.py` has the way for one that is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LOSS_SLICE = 2048
"""Learned tokens whose logits exist at a time: 2,048 x 152k x (4 + 2 + 2) bytes = 2.5 GB in bf16."""


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of `head(states)` against `targets`, in fp32."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """states [N, hidden], targets [N], weight [vocabulary, hidden]."""
        total = states.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        for start in range(0, len(states), LOSS_SLICE):
            part = slice(start, start + LOSS_SLICE)
            wanted = targets[part, None]
            scores = nn.functional.log_softmax(nn.functional.linear(states[part], weight, bias), -1, dtype=torch.float32)
            total -= scores.gather(1, wanted).sum()
            if gradient is not None:
                # d loss / d logits is the softmax, less 1 at the wanted token
                scores.exp_().scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=torch.float32))
                torch.mm(scores.to(states.dtype), weight, out=gradient[part])
            del scores
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None
