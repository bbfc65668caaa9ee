"""The slots of the default engine while one list of requests runs: admission, decoding steps, and what has ended."""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from cotvalve.engines import kernels, sampling
from cotvalve.engines.sampling import Encoded, uniforms
from cotvalve.engines.slots import Ends, SlotLayer, Span, Window, reads_rows
from cotvalve.types import Completion

if TYPE_CHECKING:
    from cotvalve.engines.transformers import TransformersEngine

SPAN = 8
"""Rows that read the cache together on a CPU: fewer read less past their ends, more make fewer calls."""

WIDE = 1 << 29
"""Bytes of the widest 16-bit tensor while prompts are read on a GPU."""

Ended = tuple[Encoded, list[int]]
"""A chain that has ended, and its token ids."""


class Batch:
    """The slots while one list of requests runs (in live.py: while a server does)."""

    def __init__(
        self, engine: TransformersEngine, waiting: list[Encoded], slots: int, alpha: float, context: int | None = None
    ) -> None:
        """`context` cache positions per slot; None: as many as `waiting` needs."""
        self.engine, self.valve, self.graphs_on = engine, engine.valve, engine.graphs
        self.codec = engine._codec  # pyright: ignore[reportPrivateUsage]  its own engine's
        self.model = engine.valve.model
        self.device = self.model.device
        self.cuda = self.device.type == "cuda"
        self.grain = 256 if self.cuda else 32
        """Cache lengths are rounded up to this, so that few graphs are captured."""
        self.burst = 8 if self.cuda else 4
        """Decoding steps between two looks at what has finished."""
        wide = getattr(self.model.config, "intermediate_size", None) or 4 * self.model.config.hidden_size
        self.prefill = min(65536, max(4096, WIDE // (2 * wide))) if self.cuda else 4096
        """Prompt tokens read at once: on a GPU so many that launching the kernels takes less time than they do."""
        self.whole = alpha
        self.waiting = deque(waiting)
        self.slots: list[Encoded | None] = [None] * slots
        # What is asked of all slots after every burst, while the card waits, is asked of arrays.
        self.taken = np.zeros(slots, bool)
        """Which slots hold a chain."""
        self.filled = np.zeros(slots, np.int64)
        """Per slot, an upper bound of the next cache position."""
        self.rooms = np.zeros(slots, np.int64)
        """Per slot, its chain's limit of new tokens."""
        new = context or max(e.room for e in waiting)
        length = self._round(context or max(len(e.ids) + e.room for e in waiting))
        config = self.model.config
        self.own_lengths = reads_rows(self.model)
        """Whether each row reads as far as it reaches, and not as far as the longest one."""
        self.window = Window(by_token=self.own_lengths)
        self.layers = [SlotLayer(self.window, slots, length) for _ in range(config.num_hidden_layers)]
        self.cache = Cache(layers=[*self.layers])
        self.length = length
        self.ids, self.position, self.count, self.room = (
            torch.zeros(slots, dtype=torch.long, device=self.device) for _ in range(4)
        )
        self.alive = torch.zeros(slots, dtype=torch.bool, device=self.device)
        self.out = torch.zeros(slots, new, dtype=torch.long, device=self.device)
        self.alpha, self.temperature = (torch.zeros(slots, device=self.device) for _ in range(2))
        self.top_p = torch.ones(slots, device=self.device)
        self.sampled = any(e.request.temperature > 0 for e in waiting)
        self.cut = any(e.request.top_p < 1 for e in waiting)
        self.uniform = torch.zeros(slots, new if self.sampled or context else 1, device=self.device)
        self.stops = torch.tensor(self.codec.stops, dtype=torch.long, device=self.device)
        self.every = torch.arange(length, device=self.device)
        self.numbers = torch.arange(slots + 1, dtype=torch.int32, device=self.device)
        self.starts = self.numbers * length
        self.graphs: dict[tuple[int, int, bool, bool], torch.cuda.CUDAGraph] = {}
        self.rows = slots
        self.spans: list[Span] | None = None

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or bool(self.taken.any())

    def unfinished(self) -> list[Encoded]:
        """Everything that has not been yielded, to be run again from its prompt."""
        return [e for e in self.slots if e is not None] + list(self.waiting)

    def _round(self, length: int) -> int:
        return -(-length // self.grain) * self.grain

    def advance(self) -> list[Completion]:
        """Admits, decodes one burst, and hands back what has finished."""
        self.launch()
        return [self.codec.completion(*ended) for ended in self.collect()]

    @torch.inference_mode()
    def launch(self) -> None:
        """Admits what waits and starts one burst; on a GPU that returns long before it is done."""
        if self.busy:
            with kernels.on(self.device):
                self._launch()

    def _launch(self) -> None:
        self._refill()
        steps = min(self.burst, int(self.rooms.max()))
        length = self.length
        if not self.own_lengths:
            length = min(length, self._round(int(self.filled[: self.rows][self.taken[: self.rows]].max()) + steps))
        self.spans = None if self.cuda else self._spans(steps, length)
        for _ in range(steps):
            self._step(length)
        self.filled[: self.rows] += steps

    def _spans(self, steps: int, length: int) -> list[Span]:
        """How far each few rows reach in the next `steps` steps."""
        starts = range(0, self.rows, SPAN)
        return [
            Span(a, min(a + SPAN, self.rows), min(length, self._round(int(self.filled[a : a + SPAN].max()) + steps)))
            for a in starts
        ]

    def _refill(self) -> None:
        free = np.flatnonzero(~self.taken[: self.rows])
        if self.waiting and (len(free) >= max(1, self.rows // 8) or len(free) == self.rows):
            self._admit(free.tolist())
        elif not self.waiting:
            self._compact()

    def _admit(self, free: list[int]) -> None:
        """Fills free slots. A prompt is cached but for its last token, which the next step reads."""
        taken: list[tuple[int, Encoded]] = []
        while free and self.waiting:
            taken.append((free.pop(), self.waiting.popleft()))
        taken.sort(key=lambda pair: -len(pair[1].ids))
        index = torch.tensor([slot for slot, _ in taken], device=self.device)
        encoded = [e for _, e in taken]

        def put(name: str, values: list[Any]) -> None:
            old: Tensor = getattr(self, name)
            old[index] = torch.tensor(values, dtype=old.dtype, device=self.device)

        put("ids", [e.ids[-1] for e in encoded])
        put("position", [len(e.ids) - 1 for e in encoded])
        put("room", [e.room for e in encoded])
        put("alpha", [e.request.alpha for e in encoded])
        put("temperature", [e.request.temperature for e in encoded])
        put("top_p", [e.request.top_p for e in encoded])
        self.count[index] = 0
        self.alive[index] = True
        for slot, e in taken:
            self.slots[slot], self.taken[slot], self.filled[slot], self.rooms[slot] = e, True, len(e.ids), e.room
        if any(e.request.temperature > 0 for e in encoded):
            drawn = np.zeros((len(taken), self.uniform.shape[1]), np.float32)
            for row, e in zip(drawn, encoded, strict=True):
                if e.request.temperature > 0:
                    row[: e.room] = uniforms(e.request, e.room)
            self.uniform[index] = self._there(drawn)
        start = 0
        while start < len(taken) and (width := len(encoded[start].ids) - 1) > 0:
            stop = start + max(1, self.prefill // width)
            self._prefill(index[start:stop], encoded[start:stop], width)
            start = stop

    def _there(self, values: np.ndarray) -> Tensor:
        """On the model's device; a GPU fetches it when it is there, and the processor goes on."""
        here = torch.from_numpy(values)
        return here.pin_memory().to(self.device, non_blocking=True) if self.cuda else here.to(self.device)

    def _prefill(self, slots: Tensor, encoded: list[Encoded], width: int) -> None:
        lengths = np.array([len(e.ids) - 1 for e in encoded])
        padded = np.zeros((len(encoded), width), np.int64)
        padded[np.arange(width) < lengths[:, None]] = np.fromiter(chain.from_iterable(e.ids[:-1] for e in encoded), np.int64, lengths.sum())
        ids = self._there(padded)
        self.window.slots = slots
        with self.valve.at(self.alpha[slots] if self.valve.rows else self.whole):
            # Causal attention never looks right, so padding on the right needs no mask; and no logits are wanted.
            self.model.get_decoder()(
                input_ids=ids, position_ids=torch.arange(width, device=self.device)[None].expand(len(encoded), -1),
                past_key_values=self.cache, use_cache=True,
            )  # fmt: skip
        self.window.slots = None

    def _step(self, length: int) -> None:
        if not self.graphs_on:
            return self._decode(length)
        key = self.rows, length, self.sampled, self.cut
        if key in self.graphs:
            return self.graphs[key].replay()
        # The first step of a shape runs eagerly (it is a real step, and it warms the libraries up); the
        # graph is captured after it, which runs nothing.
        self.graphs[key] = self.engine.last = kernels.captured(lambda: self._decode(length), self.engine.last)

    def _decode(self, length: int) -> None:
        """One token for the first `rows` slots; rows that have ended stay where they are."""
        n = self.rows
        ids, position, count, alive = self.ids[:n], self.position[:n], self.count[:n], self.alive[:n]
        self.window.rows, self.window.length, self.window.position = n, length, position
        mask, how = None, dict[str, Any]()
        if self.own_lengths:
            self.window.position = self.starts[:n] + position
            how["ends"] = Ends(self.numbers[: n + 1], self.starts[: n + 1], (position + 1).int(), length)
        else:
            mask = (self.every[:length] <= position[:, None])[:, None, None]
            if self.spans:
                how["spans"] = self.spans
        with self.valve.at(self.alpha[:n] if self.valve.rows else self.whole):
            logits = self.model(
                input_ids=ids[:, None], position_ids=position[:, None], attention_mask=mask,
                past_key_values=self.cache, use_cache=True, **how,
            ).logits[:, -1]  # fmt: skip
        if self.sampled:
            uniform = self.uniform[:n].gather(1, count[:, None].clamp_max(self.uniform.shape[1] - 1))[:, 0]
            token = sampling.sample(logits, uniform, self.temperature[:n], self.top_p[:n] if self.cut else None)
        else:
            token = sampling.greedy(logits)
        token = torch.where(alive, token, ids)
        slot = count[:, None].clamp_max(self.out.shape[1] - 1)
        self.out[:n].scatter_(1, slot, torch.where(alive[:, None], token[:, None], self.out[:n].gather(1, slot)))
        ids.copy_(token)
        count.add_(alive)
        position.add_(alive)
        alive.logical_and_((token[:, None] != self.stops).all(1) & (count < self.room[:n]))

    @torch.inference_mode()
    def collect(self) -> list[Ended]:
        """Waits for the burst; what has ended in it, whose slots are free now."""
        alive, count = torch.stack((self.alive[: self.rows], self.count[: self.rows])).cpu().numpy()
        ended = np.flatnonzero(self.taken[: self.rows] & (alive == 0)).tolist()
        if not ended:
            return []
        out = self.out[torch.tensor(ended, device=self.device)].tolist()
        found: list[Ended] = []
        for i, ids in zip(ended, out, strict=True):
            e = self.slots[i]
            assert e is not None
            found.append((e, ids[: count[i]]))
            self._clear(i)
        return found

    def _clear(self, slot: int) -> None:
        self.slots[slot], self.taken[slot], self.filled[slot], self.rooms[slot] = None, False, 0, 0

    def _compact(self) -> None:
        """With nothing left to admit, moves the live rows to the front once enough rows have ended."""
        live = np.flatnonzero(self.taken[: self.rows]).tolist()
        rows = max(8 if self.cuda else 1, 1 << (len(live) - 1).bit_length())
        # A new number of rows is a new graph on CUDA, so steps are larger there.
        if rows > self.rows // (4 if self.cuda else 2):
            return
        order = live + np.flatnonzero(~self.taken[: self.rows]).tolist()[: rows - len(live)]
        index = torch.tensor(order, device=self.device)
        for name in ("ids", "position", "count", "room", "alive", "out", "alpha", "temperature", "top_p", "uniform"):
            state: Tensor = getattr(self, name)
            state[:rows] = state[index]
        reach = int(self.filled[live].max())
        for layer in self.layers:
            layer.move(rows, index, reach)
        self.alive[rows:] = False
        beyond = len(self.slots) - rows
        self.slots = [self.slots[i] for i in order] + [None] * beyond
        for held in (self.taken, self.filled, self.rooms):
            held[:rows] = held[order]
            held[rows:] = 0
        self.rows = rows
