"""The slots' cache and its attention: what lets every row of a batch stand at its own position.

Keys and values of all slots lie in one static tensor per layer; a `Window` says which part of it the next forward
reads and writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "cotvalve_slots"


class Span(NamedTuple):
    """Rows `start` to `stop` of a decoding step, and the cache positions that the longest of them reaches."""

    start: int
    stop: int
    reach: int


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, spans: Sequence[Span] | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """SDPA; a decoding step folds the query heads that share a key head into the query length.

    [B, H, 1, D] -> [B, K, H/K, D], so that keys and values are read once and not copied H/K times. With `spans`
    a few rows at a time read no further than they reach: on a CPU a step's time is what it reads.
    """
    if query.shape[2] != 1 or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows, heads, _, _ = query.shape
    folded = query.reshape(rows, key.shape[1], heads // key.shape[1], -1)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if spans is None:
        out = sdpa(folded, key, value, attn_mask=attention_mask, scale=scaling)
    else:
        out = torch.cat([
            sdpa(folded[a:b], key[a:b, :, :reach], value[a:b, :, :reach], attn_mask=attention_mask[a:b, ..., :reach], scale=scaling)
            for a, b, reach in spans
        ])  # fmt: skip
    return out.reshape(rows, 1, heads, value.shape[-1]), None


# Without a mask function under this name, transformers hands masks through as they are given.
AttentionInterface.register(ATTENTION, _attention)


class Window:
    """Which part of the cache the next forward reads and writes; shared by all layers."""

    def __init__(self) -> None:
        self.slots: Tensor | None = None
        """Prefill: the slot of each row [n]. None in a decoding step."""
        self.rows = self.length = 0
        """Decoding: the first `rows` slots up to cache position `length`."""
        self.position: Tensor | None = None
        """Decoding: where each row writes, [rows]."""


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [slots, heads, length, dim], written at each row's own position."""

    def __init__(self, window: Window, slots: int, length: int) -> None:
        super().__init__()
        self.window, self.slots, self.length = window, slots, length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self.slots, key_states.shape[1], self.length)
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        window = self.window
        if window.slots is not None:
            width = key_states.shape[2]
            self.keys[window.slots, :, :width] = key_states
            self.values[window.slots, :, :width] = value_states
            return key_states, value_states
        every = torch.arange(window.rows, device=key_states.device)
        self.keys[every, :, window.position] = key_states[:, :, 0]
        self.values[every, :, window.position] = value_states[:, :, 0]
        return self.keys[: window.rows, :, : window.length], self.values[: window.rows, :, : window.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.length
