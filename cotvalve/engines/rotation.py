"""Rotary positions in one kernel instead of ten: with the norms they are half of a layer's kernels in a decoding step.

transformers keeps the rotation as a function beside its attention classes, and Liger and others take its place there.
So does this, while an engine runs, where it proves to be q cos + rotate_half(q) sin.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cotvalve.engines.replaced import Replacement

NAME = "apply_rotary_pos_emb"
HEADS = 8
"""That one program turns."""
Pair = tuple[Tensor, Tensor]


def fused_rotation(model: nn.Module) -> Iterator[Replacement]:
    """The rotation of the model's attention layers. One that computes otherwise is left out."""
    config: Any = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    like = next(model.parameters())
    for name in {type(module).__module__ for module in model.modules() if hasattr(module, "q_proj")}:
        general = vars(sys.modules[name]).get(NAME)
        if general is not None and all(_proves(general, dim, tokens, like) for tokens in (1, 5)):
            yield sys.modules[name], NAME, partial(_rotated, general)


def _proves(general: Callable[..., Pair], dim: int, tokens: int, like: Tensor) -> bool:
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(like.device, like.dtype)

    # As layers cut them: heads behind tokens in memory.
    q, k = (some(3, tokens, heads, dim).transpose(1, 2) for heads in (9, 2))
    cos, sin = some(3, tokens, dim), some(3, tokens, dim)
    with torch.no_grad():
        pairs = zip(general(q, k, cos, sin), rotated(q, k, cos, sin), strict=True)
        return all(torch.allclose(wanted.float(), found.float(), rtol=0.02, atol=0.02) for wanted, found in pairs)


def _rotated(general: Callable[..., Pair], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Pair:
    whole = q.ndim == 4 and cos.ndim == 3 and cos.shape[-1] == q.shape[-1] and cos.shape[0] in (1, q.shape[0])
    alike = q.dtype == k.dtype == cos.dtype and q.stride(-1) == k.stride(-1) == 1
    if more or named or torch.is_grad_enabled() or not (whole and alike and q.is_cuda):
        return general(q, k, cos, sin, *more, **named)
    return rotated(q, k, cos, sin)


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    """q and k [B, heads, T, D] turned by cos and sin [B or 1, T, D]; heads lie behind tokens in the memory of both results."""
    from cotvalve.engines.tiles import rotation_tile

    rows, heads, tokens, dim = q.shape
    others = k.shape[1]
    out_q, out_k = (x.new_empty(rows, tokens, count, dim) for x, count in ((q, heads), (k, others)))
    cos, sin = cos.contiguous(), sin.contiguous()
    blocks = -(-heads // HEADS)
    tile: Any = rotation_tile
    tile[(rows * tokens, blocks - (-others // HEADS))](
        q, k, cos, sin, out_q, out_k, tokens, heads, others, blocks, *q.stride()[:3], *k.stride()[:3],
        cos.stride(0) if len(cos) > 1 else 0, dim // 2, HALF=1 << (dim // 2 - 1).bit_length(), HEADS=HEADS,
    )  # fmt: skip
    return out_q.transpose(1, 2), out_k.transpose(1, 2)
