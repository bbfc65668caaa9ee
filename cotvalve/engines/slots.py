"""The slots' cache and its attention: what lets every row of a batch stand at its own position.

Keys and values of all slots lie in one static tensor per layer; a `Window` says which part of it the next forward
reads and writes. Where there is a kernel for it (`reads_rows`) each row reads its own length; elsewhere all rows read
as far as the longest one, under a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "cotvalve_slots"


Placed = tuple[Tensor, Tensor, Tensor]
"""Keys and values of all slots, [slots * length, heads, dim], and where each row writes [rows]."""


class Span(NamedTuple):
    """Rows `start` to `stop` of a decoding step, and the cache positions that the longest of them reaches."""

    start: int
    stop: int
    reach: int


class Ends(NamedTuple):
    """What the attention kernel is told of a decoding step's rows; int32, on the model's device."""

    queries: Tensor
    """[rows + 1] 0, 1, 2, ...: one query a row."""
    starts: Tensor
    """[rows + 1] where each slot begins in the cache, counted through."""
    used: Tensor
    """[rows] tokens that the row has cached."""
    length: int
    """Cache positions of a slot."""


def reads_rows(model: PreTrainedModel) -> bool:
    """Whether a kernel can read each row's own length: 16 bits, an NVIDIA card since Ampere, heads of up to 256."""
    config: Any = model.config.get_text_config()
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        model.device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(model.device) >= (8, 0)
        and model.dtype in (torch.bfloat16, torch.float16)
        and dim % 8 == 0
        and dim <= 256
    )


def read_rows(query: Tensor, key: Tensor, value: Tensor, ends: Ends, scaling: float | None) -> Tensor:
    """One query a row [B, H, D] on keys and values [slots * length, K, D], each row up to its end; gives [B, H, D].

    Flash attention folds the query heads that share a key head, so that keys and values are read once.
    """
    kernel: Any = torch.ops.aten._flash_attention_forward
    return kernel(
        query, key, value, ends.queries, ends.starts, 1, ends.length, 0.0, False, False, scale=scaling, seqused_k=ends.used
    )[0]  # fmt: skip


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, spans: Sequence[Span] | None = None, ends: Ends | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """SDPA; a decoding step folds the query heads that share a key head into the query length.

    [B, H, 1, D] -> [B, K, H/K, D], so that keys and values are read once and not copied H/K times. With `spans`
    a few rows at a time read no further than they reach: on a CPU a step's time is what it reads. With `ends` the
    kernel reads each row's own length.
    """
    if ends is not None:
        return read_rows(query[:, :, 0], key.flatten(0, 1), value.flatten(0, 1), ends, scaling)[:, None], None
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
AttentionInterface.register(ATTENTION, attention)


class Window:
    """Which part of the cache the next forward reads and writes; shared by all layers."""

    def __init__(self, *, by_token: bool = False) -> None:
        self.by_token = by_token
        """Whether caches lie token by token, [slots, length, heads, dim], as the kernel wants them."""
        self.slots: Tensor | None = None
        """Prefill: the slot of each row [n]. None in a decoding step."""
        self.rows = self.length = 0
        """Decoding: the first `rows` slots up to cache position `length`."""
        self.position: Tensor | None = None
        """Decoding: where each row writes, [rows]; counted through all slots where caches lie token by token."""


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [slots, heads, length, dim], written at each row's own position."""

    def __init__(self, window: Window, slots: int, length: int) -> None:
        super().__init__()
        self.window, self.slots, self.length = window, slots, length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        heads = key_states.shape[1]
        shape = (self.slots, self.length, heads) if self.window.by_token else (self.slots, heads, self.length)
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
            if window.by_token:
                self.keys[window.slots, :width] = key_states.transpose(1, 2)
                self.values[window.slots, :width] = value_states.transpose(1, 2)
            else:
                self.keys[window.slots, :, :width] = key_states
                self.values[window.slots, :, :width] = value_states
            return key_states, value_states
        assert window.position is not None
        if window.by_token:
            self.keys.flatten(0, 1).index_copy_(0, window.position, key_states[:, :, 0])
            self.values.flatten(0, 1).index_copy_(0, window.position, value_states[:, :, 0])
            return self.keys, self.values
        every = torch.arange(window.rows, device=key_states.device)
        self.keys[every, :, window.position] = key_states[:, :, 0]
        self.values[every, :, window.position] = value_states[:, :, 0]
        return self.keys[: window.rows, :, : window.length], self.values[: window.rows, :, : window.length]

    def placed(self) -> Placed | None:
        """Where a decoding step writes, for a kernel that does; None elsewhere, and before anything was written."""
        window = self.window
        if window.slots is not None or window.position is None or not (window.by_token and self.is_initialized):
            return None
        assert self.keys is not None
        assert self.values is not None
        return self.keys.flatten(0, 1), self.values.flatten(0, 1), window.position

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.length

    def move(self, rows: int, index: Tensor, reach: int) -> None:
        """Makes the slots `index` [rows] the first `rows` ones, as far as position `reach`."""
        for cached in (self.keys, self.values):
            assert cached is not None
            if self.window.by_token:
                cached[:rows, :reach] = cached[index, :reach]
            else:
                cached[:rows, :, :reach] = cached[index, :, :reach]
