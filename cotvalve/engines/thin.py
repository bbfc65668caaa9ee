"""alpha * A x in one kernel: the thin product of a LoRA layer, its row's alpha multiplied in before it is written.

PyTorch makes it with a product, which on so few columns often is two kernels, and a multiplication that mixes bf16 with
the fp32 alpha. A decoding step of a small model is mostly the number of its kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cotvalve.engines.kernels import power
from cotvalve.inlets import ADAPTER, FEW, Inlets, weight

WIDEST = 128
"""The most columns (ranks of layers that share an input, summed up) that one tile holds."""


def proves(inlets: Inlets) -> bool:
    """Whether the kernel gives what PyTorch gives, for each shape of A: one card's Triton is not another's."""
    inlets.look()
    shapes: dict[torch.Size, Tensor] = {}
    for inlet in inlets.of.values():
        for a in [inlet.down] if inlet.down is not None else [weight(layer.lora_A[ADAPTER]) for layer in inlet.layers]:
            shapes[a.shape] = a
    return all(_proves(a, tokens) for a in shapes.values() for tokens in (1, FEW // 2))


def _proves(a: Tensor, tokens: int) -> bool:
    x = torch.linspace(-2, 2, 3 * a.shape[1], device=a.device, dtype=a.dtype).view(3, 1, -1).expand(-1, tokens, -1)
    alpha = torch.tensor([1.0, 0.0, -0.7], device=a.device).view(3, 1, 1)
    with torch.no_grad():
        wanted, found = (x @ a.t()).float() * alpha, thin(x, a, alpha).float()
    return torch.allclose(found, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))


def thin(x: Tensor, a: Tensor, alpha: Tensor) -> Tensor:
    """alpha * A x [..., r] of x [..., in], A [r, in] and one alpha for all, per row [B, 1, 1] or per token [B, T, 1]; 0 where alpha is.

    A x is rounded before alpha multiplies it, as PyTorch's product is.
    """
    from cotvalve.engines.tiles import thin_tile

    rank, width = a.shape
    if rank > WIDEST:
        return torch.where(alpha == 0, 0.0, (x @ a.t()) * alpha).to(x.dtype)
    flat = x.reshape(-1, width).contiguous()
    rows = len(flat)
    out = x.new_empty(*x.shape[:-1], rank)
    tall = 16 if rows <= FEW else 64  # small tiles fill the card with few rows
    across = power(rank)
    # Three stages of both tiles in the 99 KB that every card since Ampere has.
    deep = 256 if tall + across <= 48 else 128 if tall + across <= 128 else 64
    tile: Any = thin_tile
    tile[(-(-rows // tall),)](
        flat, a.contiguous(), alpha.reshape(-1).contiguous(), out, rows, width, rows // alpha.numel(), rank,
        RANK=across, ROWS=tall, DEEP=deep, PARTS=4 if tall == across == 16 else 1, num_stages=3,
    )  # fmt: skip
    return out
