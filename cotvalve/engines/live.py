"""A batch that never closes: requests join free slots while others decode. The server's way into the engine.

    live.add(request); for event in live.step(): ...

The slots and the cache are laid out once, for `context` tokens each; the number of rows that are computed
follows the number of chains that run. One thread calls `add`, `drop` and `step`. With an exact task vector
all chains of a moment share one alpha: requests wait, in their order, until the ones before them are done.
"""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cotvalve.engines.batch import Batch
from cotvalve.engines.sampling import Encoded
from cotvalve.engines.transformers import TransformersEngine
from cotvalve.types import Completion

if TYPE_CHECKING:
    from cotvalve.valve import Valve

MOST_SLOTS = 256
"""More slots than this are only memory: a server seldom has so many chains at once."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that a chain has grown by; the last ones come with its `Completion`."""

    id: str
    ids: list[int]


class Live:
    """Slots of a `TransformersEngine`, open to new requests."""

    streams = True

    def __init__(
        self, valve: Valve, *, slots: int | None = None, context: int = 8192, graphs: bool | None = None
    ) -> None:
        """`slots` chains at once (None: from memory), each of up to `context` tokens with its prompt."""
        engine = TransformersEngine(valve, batch=slots, graphs=graphs)
        self.valve, self.context = valve, context
        self.slots = slots or min(MOST_SLOTS, engine.slots_that_fit(self.context))
        self._queue: deque[Encoded] = deque()
        self._watched: dict[str, int] = {}
        self._stack = ExitStack()
        self._stack.enter_context(engine.fitted())
        self._batch = _Open(engine, [], self.slots, 0.0, self.context)
        self._moved = ExitStack()

    @property
    def busy(self) -> bool:
        """True while a chain runs or waits."""
        return bool(self._queue) or self._batch.busy

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._queue) + len(self._batch.waiting)

    def add(self, encoded: Encoded, *, watch: bool = False) -> None:
        """Takes a request in; `watch` asks for its tokens as they come. Its id must not be in use."""
        assert len(encoded.ids) + encoded.room <= self.context
        self._queue.append(encoded)
        if watch:
            self._watched[encoded.request.id] = 0

    def drop(self, id: str) -> None:
        """Forgets a request whether it waits, runs or has ended; its slot is free for the next one."""
        self._watched.pop(id, None)
        self._queue = deque(e for e in self._queue if e.request.id != id)
        self._batch.drop(id)

    @torch.inference_mode()
    def step(self) -> list[Piece | Completion]:
        """Admits what waits, decodes a few tokens of every chain, and tells what came of it."""
        self._admit()
        if not self._batch.busy:
            return []
        ended = self._batch.advance()
        for completion in ended:
            self._watched.pop(completion.id, None)
        return [*self._pieces(), *ended]

    def close(self) -> None:
        """Gives the model back as it was."""
        self._moved.close()
        self._stack.close()

    def _admit(self) -> None:
        if self.valve.rows:
            self._batch.waiting.extend(self._queue)
            self._queue.clear()
            return
        if not self._batch.busy and self._queue:
            self._moved.close()
            alpha = self._batch.whole = self._queue[0].request.alpha
            # Held open, so that the weights are moved once and not at every token.
            self._moved.enter_context(self.valve.at(alpha))
        while self._queue and self._queue[0].request.alpha == self._batch.whole:
            self._batch.waiting.append(self._queue.popleft())

    def _pieces(self) -> list[Piece]:
        if not self._watched:
            return []
        batch = self._batch
        count = batch.count.tolist()
        rows = [
            (i, e.request.id)
            for i, e in enumerate(batch.slots)
            if e is not None and count[i] > self._watched.get(e.request.id, count[i])
        ]
        if not rows:
            return []
        first, last = min(self._watched[id] for _, id in rows), max(count[i] for i, _ in rows)
        out = batch.out[torch.tensor([i for i, _ in rows], device=batch.device), first:last].tolist()
        pieces: list[Piece] = []
        for (i, id), ids in zip(rows, out, strict=True):
            pieces.append(Piece(id, ids[self._watched[id] - first : count[i] - first]))
            self._watched[id] = count[i]
        return pieces


class _Open(Batch):
    """A batch whose rows follow the load, up and down."""

    def _refill(self) -> None:
        fewest = 8 if self.cuda else 1
        live = int(self.taken.sum())
        wanted = 1 << max(0, live + len(self.waiting) - 1).bit_length()
        self.rows = min(len(self.slots), max(self.rows, wanted, fewest))
        free = np.flatnonzero(~self.taken[: self.rows]).tolist()
        if self.waiting and free:
            self._admit(free[::-1])
        elif not self.waiting:
            self._compact()
        running = [e.request for e in self.slots if e is not None]
        self.sampled = any(request.temperature > 0 for request in running)
        self.cut = any(request.top_p < 1 and request.temperature > 0 for request in running)

    def drop(self, id: str) -> None:
        """Takes a request out, wherever it is."""
        self.waiting = type(self.waiting)(e for e in self.waiting if e.request.id != id)
        for i, e in enumerate(self.slots):
            if e is not None and e.request.id == id:
                self._clear(i)
                self.alive[i] = False
